"""`peftcore status`: what runs and ran, the champion, the newest version, the next retraining, the disk, leftovers."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.gate.promote import promote, roll_back
from flows.pipeline.status import next_step, status
from flows.runtime.last_run import running_file


def look(project: Any) -> dict[str, Any]:
    return json.loads(json.dumps(status(project.params, project.paths)))


def test_a_new_project_has_nothing_yet(project: Any) -> None:
    found = look(project)
    assert found["running"] == [] and found["hints"] == [] and found["registry"] == {}
    assert [found[part] for part in ("last_run", "champion", "candidate")] == [None] * 3
    assert found["retraining"] == {"last": None, "schedule": None, "incoming": None}
    cached = sum(file.stat().st_size for file in (project.root / ".dvc/cache").rglob("*") if file.is_file())
    assert found["disk"]["cache"] == cached > 1000
    assert found["disk"]["free"] > 0 and found["disk"]["checkpoints"] == 0


def test_it_names_what_is_not_committed(project: Any) -> None:
    assert look(project)["uncommitted"] == ""
    project.paths.params.write_text(project.paths.params.read_text() + "# a change\n")
    assert look(project)["uncommitted"].startswith("params.yaml (`git add params.yaml && git commit`")


def test_what_comes_next_follows_from_the_facts() -> None:
    facts: dict[str, Any] = {"running": [], "candidate": None, "retraining": {"incoming": None}}
    assert "`peftcore run` makes the first version" in next_step(facts)
    version = {"version": "v0.1.0", "verdict": "not judged here"}
    assert next_step(facts | {"candidate": version}) == "`peftcore promote --version v0.1.0` judges it"
    changed = {"train": ["method.r"], "fetch": [], "evaluate": ["train"]}
    assert "runs train, evaluate again" in next_step(facts | {"candidate": version, "stages": changed})
    assert "review.html" in next_step(facts | {"candidate": version | {"verdict": "refused"}})
    unapproved = version | {"verdict": "refused", "reason": "approval: 0 of 1; people other than ..."}
    assert "`peftcore promote --version v0.1.0` judges it again" in next_step(facts | {"candidate": unapproved})
    assert "makes a new version" in next_step(facts | {"candidate": version | {"verdict": "rolled back"}})
    assert "serve --watch" in next_step(facts | {"candidate": version | {"verdict": "promoted"}})
    assert "wait" in next_step(facts | {"running": [{"what": "run"}]})
    incoming = facts | {"retraining": {"incoming": "~/incoming"}}
    assert next_step(incoming) == "`peftcore retrain` makes the first version", (
        "`peftcore run` does not read that folder"
    )
    refused = next_step(incoming | {"candidate": version | {"verdict": "refused"}})
    assert "`peftcore retrain --force`" in refused and "reports/retraining/index.html shows why" in refused
    promoted = {"candidate": version | {"verdict": "promoted"}, "stages": changed}
    assert "serve --watch" in next_step(incoming | promoted), "its stages ran in another working tree"


def test_champion_and_newest_version_with_its_verdict(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=3.6, weight=2.0)
    assert look(registered)["candidate"]["verdict"] == "not judged here"
    promote(registered.params, registered.paths)
    found = look(registered)
    champion, candidate = found["champion"], found["candidate"]
    assert (champion["version"], champion["stage"], champion["test_loss"]) == ("v0.1.0", "champion", 2.7)
    assert abs(datetime.fromisoformat(champion["since"]) - datetime.now(UTC)) < timedelta(minutes=5)
    assert (candidate["version"], candidate["verdict"]) == ("v0.1.1", "refused")
    assert candidate["reason"] == "gain in loss: 0.200 nats, at least 0.5"


def test_the_verdict_of_a_retraining_stays_when_later_ones_find_nothing_new(registered: Any) -> None:
    promotion = {"version": "v0.1.0", "outcome": "refused", "report": {"reason": "EOS rate: 0.1, at least 0.9"}}
    lines = [{"outcome": "kept", "promotion": promotion}, {"outcome": "unchanged", "promotion": None}]
    registered.paths.retraining.mkdir(parents=True)
    registered.paths.retraining_history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = look(registered)
    assert (found["candidate"]["verdict"], found["candidate"]["reason"]) == ("refused", "EOS rate: 0.1, at least 0.9")
    assert found["retraining"]["last"]["outcome"] == "unchanged"


def test_a_version_that_was_rolled_back_says_so(registered: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=1.9, weight=2.0)
    assert promote(registered.params, registered.paths).accepted
    roll_back(registered.params, registered.paths, reason="wrong answers")
    candidate = look(registered)["candidate"]
    assert (candidate["version"], candidate["verdict"]) == ("v0.1.1", "rolled back")
    assert "wrong answers" in candidate["reason"]


def test_a_champion_that_gto_registered_has_no_test_loss(project: Any) -> None:
    for tag in ("docstrings@v0.1.0", "docstrings#champion#1"):
        project.git("tag", "--annotate", tag, "--message=by gto register and gto assign")
    champion = look(project)["champion"]
    assert (champion["version"], champion["test_loss"]) == ("v0.1.0", None)


def test_retrainings_last_and_next(project: Any) -> None:
    folder = project.paths.retraining
    folder.mkdir(parents=True)
    lines = [{"outcome": "kept", "finished": "a"}, {"outcome": "promoted", "finished": "b", "promotion": None}]
    project.paths.retraining_history.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    note = {"cron": "30 4 * * *", "timezone": "Europe/Berlin", "pid": os.getpid()}
    project.paths.schedule.write_text(json.dumps(note))
    told = look(project)["retraining"]
    assert told["last"]["finished"] == "b"
    assert told["schedule"]["alive"] is True
    following = datetime.fromisoformat(told["schedule"]["next"])
    assert timedelta(0) < following - datetime.now(UTC) <= timedelta(hours=25)
    assert (following.hour, following.minute) in ((3, 30), (2, 30)), "04:30 in Berlin, in winter or summer"
    project.paths.schedule.write_text(json.dumps(note | {"pid": ended_process()}))
    assert "start `peftcore schedule` again" in " ".join(look(project)["hints"])


def test_what_another_host_has_noted_is_not_taken_for_dead(project: Any) -> None:
    """On a shared disk; its process numbers mean nothing here."""
    elsewhere = {"pid": ended_process(), "host": "far/12345678"}
    note = {"cron": "30 4 * * *", "timezone": "Europe/Berlin"}
    project.paths.schedule.parent.mkdir(parents=True, exist_ok=True)
    project.paths.schedule.write_text(json.dumps(note | elsewhere))
    run = {"started": "2026-01-01T00:00:00+00:00", "task": "train", "start_time": 1.0}
    running_file(project.paths).write_text(json.dumps(run | elsewhere))
    lock = project.root / ".dvc" / "tmp" / "retraining" / "lock"
    (lock.parent / "tree").mkdir(parents=True)
    lock.write_text(f"process {elsewhere['pid']} on {elsewhere['host']}\n")
    found = look(project)
    assert found["hints"] == [] and found["retraining"]["schedule"]["alive"] is None
    assert [one["what"] for one in found["running"]] == ["run"]


def test_working_trees_and_what_killed_processes_left(project: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    project.git("worktree", "add", "--quiet", "--detach", str(tree))
    (tree / "big").write_bytes(bytes(10_000))
    lock = project.root / ".dvc" / "tmp" / "retraining" / "lock"
    (lock.parent / "tree").mkdir(parents=True)
    lock.write_text(f"process {ended_process()}\n")
    found = look(project)
    assert found["disk"]["worktrees"][str(tree)] > 10_000
    assert found["hints"] == ["a retraining was interrupted; `peftcore retrain` continues it"]
    lock.write_text(f"process {os.getpid()}\n")
    assert [one["what"] for one in look(project)["running"]] == ["retraining"]
    assert look(project)["hints"] == []


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.slow
def test_a_run_is_seen_while_it_runs_and_after_it_was_killed(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "make.py").write_text("open('began', 'w').close(); import time; time.sleep(100)")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # no server to wait for
    run = subprocess.Popen([sys.executable, "-m", "flows.cli", "--quiet", "run"], cwd=project.root)
    try:
        while not (project.root / "began").exists():
            assert run.poll() is None
            time.sleep(0.05)
        found = look(project)
        told = {one["what"]: one for one in found["running"]}
        assert (told["run"]["pid"], told["run"]["task"]) == (run.pid, "make")
        assert told["dvc"]["pid"] != run.pid, "DVC's own note of who uses which file"
        assert found["last_run"] is None
        monkeypatch.chdir(project.root)
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["status", "--no-stages"]).stdout
        assert f"run make (process {run.pid})" in shown and "stage" not in shown.split("\n")[0]
    finally:
        run.kill()
        run.wait()
    (hint,) = look(project)["hints"]
    assert "was killed at make; `peftcore run` continues it" in hint
