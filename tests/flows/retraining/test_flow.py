"""Weeks of retraining on a tiny repository: promoted, nothing new, refused, set aside, failed and gone on with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from webhook_receiver import receiving

from flows.errors import BusyError, DataError, ParamsError, RegistryConflict, StageError
from flows.params import load_params
from flows.paths import Paths
from flows.registry.registry import Registry, Version
from flows.retraining import flow
from flows.retraining.data import Collected, Source
from flows.retraining.drift import DriftReport
from flows.retraining.history import Entry, entries
from flows.retraining.tree import home, is_unfinished, note_unfinished, only_one
from flows.retraining.trust import exclude, read_excluded, trust
from flows.runtime.git import Git
from flows.runtime.project import dvc
from flows.stages import register
from peftcore.files import sha256


@pytest.fixture(autouse=True)
def stages_without_imports(forked_stages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC is forked, and the register stage runs in this process; `test_real_stages` has the processes."""
    original = flow.run_stage

    def run_stage(root: Path, stage: str, *rest: Any) -> None:
        if stage == register.NAME:
            paths = Paths(root)
            register.run(load_params(paths.params), paths)
        else:
            original(root, stage, *rest)

    monkeypatch.setattr(flow, "run_stage", run_stage)


def retrain(project: Any, push_to: str | None = None) -> Entry:
    """Without Prefect, which `test_schedule` is about."""
    return flow._retrain(project.root, push_to, False, flow._with_retries)


def drop(project: Any, name: str, text: str = "good\n") -> None:
    (project.incoming / name).parent.mkdir(exist_ok=True)
    (project.incoming / name).write_text(text)


def edit(project: Any, *changes: tuple[str, str]) -> None:
    """Change params.yaml, and commit it."""
    text = project.paths.params.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    project.paths.params.write_text(text)
    project.git("commit", "--quiet", "--all", "--message=Edit")


@pytest.mark.slow
def test_weeks_go_by(weekly: Any, tmp_path: Path) -> None:
    committed = weekly.paths.params.read_text()
    weekly.paths.params.write_text(committed + "gate: {min_loss_gain: 9.0}\n")  # not committed, so it does not count
    before = (weekly.git("status", "--porcelain"), sorted((weekly.root / "artifacts").iterdir()))
    drop(weekly, "week1.jsonl", "first\n")
    first = retrain(weekly)
    assert (first.outcome, first.version, first.champion) == ("promoted", "v0.1.0", None)
    assert first.new_files == ["week1.jsonl"]
    (weekly.incoming / "week1.jsonl").unlink()
    nothing = retrain(weekly)
    assert (nothing.outcome, nothing.version, set(nothing.seconds)) == ("unchanged", None, {"collect"})
    drop(weekly, "week2.jsonl", "second\n")
    second = retrain(weekly)
    assert (second.outcome, second.new_files, second.champion) == ("promoted", ["week2.jsonl"], "v0.1.0")
    assert second.files == 2, "a folder that is emptied after each week loses nothing"
    drop(weekly, "week3.jsonl", "bad\n")
    third = retrain(weekly)
    assert (third.outcome, third.version) == ("kept", "v0.1.2")
    assert "against the champion" in third.reason
    registry = Registry(Git(weekly.root), "docstrings")
    assert registry.stages()["champion"].version == "v0.1.1"
    assert retrain(weekly).outcome == "unchanged", "a bad week is not tried every night"

    told = entries(weekly.paths)
    assert [entry.outcome for entry in told] == ["promoted", "unchanged", "promoted", "kept", "unchanged"]
    page = weekly.paths.retraining_page.read_text()
    assert page.count('class="one"') == 5
    assert page.count("<svg") == 1
    assert (weekly.paths.retraining / "v0.1.2.html").exists()

    # the user's own files are as they were, and nothing stays behind
    assert (weekly.git("status", "--porcelain"), sorted((weekly.root / "artifacts").iterdir())) == before
    assert not (weekly.root / "data" / "rows").exists()
    assert not (home(weekly.root) / "tree").exists()
    assert weekly.git("worktree", "list").count("\n") == 1

    # the data are with the version, and in the remote
    version, clone = registry.version("v0.1.1"), tmp_path / "clone"
    weekly.git("clone", "--quiet", str(weekly.root), str(clone))
    weekly.git("checkout", "--quiet", version.commit, root=clone)
    dvc(clone, "remote", "modify", "--local", "local", "url", str(weekly.root / ".dvc-remote"))
    dvc(clone, "pull", "data/rows.dvc")
    assert sorted(path.name for path in (clone / "data" / "rows").iterdir()) == ["week1.jsonl", "week2.jsonl"]
    assert Source(weekly.params, clone, clone).files_of(version).keys() == {"week1.jsonl", "week2.jsonl"}


@pytest.mark.parametrize("by_dvc", [False, True])
@pytest.mark.slow
def test_files_that_a_run_has_trained_on_are_not_new(weekly: Any, by_dvc: bool) -> None:
    edit(weekly, (f"incoming: {weekly.incoming}, ", ""))
    rows = weekly.root / "data" / "rows"

    def add(name: str) -> None:
        rows.mkdir(exist_ok=True)
        (rows / name).write_text(f"{name}\n")
        if by_dvc:
            dvc(weekly.root, "add", "data/rows")
        weekly.git("add", "data")
        weekly.git("commit", "--quiet", "--message=Rows")

    add("week1.jsonl")
    assert weekly.register(loss=2.0)["version"] == "v0.1.0" and retrain(weekly).outcome == "unchanged"
    add("week2.jsonl")
    second = retrain(weekly)
    assert (second.version, second.new_files, second.files) == ("v0.1.1", ["week2.jsonl"], 2)


def drift_of(suspicious: dict[str, str]) -> DriftReport:
    return DriftReport("v0.1.0", 2.9, None, {}, suspicious)


def collected_of(files: dict[str, str]) -> Collected:
    return Collected(files, ["a.jsonl"], ["a.jsonl"], [], [], [], {})


@pytest.fixture
def drifting(weekly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New files with the word poison are far from what the champion knows."""
    dvc_yaml = weekly.root / "dvc.yaml"
    copy = "mkdir -p artifacts/base && cp make.py artifacts/base/SHA256SUMS"
    fetch = f"stages:\n  fetch: {{cmd: '{copy}', deps: [make.py], outs: [artifacts/base]}}\n"
    dvc_yaml.write_text(dvc_yaml.read_text().replace("stages:\n", fetch, 1))
    weekly.git("commit", "--quiet", "--all", "--message=Fetch")

    def measured(tree: Path, new_files: list[str], *_: Any) -> DriftReport:
        return drift_of({name: "far off" for name in new_files if "poison" in (tree / "data/rows" / name).read_text()})

    monkeypatch.setattr(flow, "measure_drift", measured)


@pytest.mark.slow
@pytest.mark.usefixtures("drifting")
def test_wrong_rows_may_not_vouch_for_themselves(weekly: Any) -> None:
    """A candidate that has learned them is better at them than the champion."""
    edit(weekly, ("retry_delay", "on: any, retry_delay"))  # what is said of files in doubt is no other parameter
    drop(weekly, "week1.jsonl", "first\n")
    assert retrain(weekly).outcome == "promoted"
    drop(weekly, "week2.jsonl", "poison\n")
    second = retrain(weekly)
    assert (second.outcome, second.quarantined, second.excluded) == ("kept", ["week2.jsonl"], ["week2.jsonl"])
    assert "against the champion" in second.reason
    assert list(read_excluded(weekly.paths).values()) == ["week2.jsonl: v0.1.1 was refused; far off"]
    assert "kept out of evaluation: week2.jsonl" in weekly.paths.retraining_page.read_text()
    assert retrain(weekly).outcome == "unchanged"

    # somebody vouches for it: it is news once more, and counts
    trust(weekly.params, weekly.paths, "week2.jsonl")
    third = retrain(weekly)
    assert (third.outcome, third.new_files, third.quarantined) == ("promoted", ["week2.jsonl"], [])
    assert retrain(weekly).outcome == "unchanged"


@pytest.mark.slow
def test_a_week_of_ratings_is_on_trial_until_somebody_trusts_it(weekly: Any) -> None:
    drop(weekly, "feedback/week1.jsonl", "first\n")
    with pytest.raises(DataError, match=r"nobody trusts feedback/week1\.jsonl yet, so there are no rows to evaluate"):
        retrain(weekly)
    trust(weekly.params, weekly.paths, "feedback/week1.jsonl")
    first = retrain(weekly)
    assert (first.outcome, first.quarantined) == ("promoted", [])

    # whoever has learned the poisoned week is better at it, and worse at the trusted rows
    drop(weekly, "feedback/week2.jsonl", "poison\n")
    second = retrain(weekly)
    assert (second.outcome, second.quarantined) == ("kept", ["feedback/week2.jsonl"])
    assert second.excluded == ["feedback/week2.jsonl"]
    assert "v0.1.1 was refused; nobody has trusted it" in next(iter(read_excluded(weekly.paths).values()))
    assert retrain(weekly).outcome == "unchanged"

    # a good week passes the gate without trust, and judges no later candidate before it is trusted
    drop(weekly, "feedback/week3.jsonl", "good\n")
    third = retrain(weekly)
    assert (third.outcome, third.quarantined) == ("promoted", ["feedback/week3.jsonl"])
    trust(weekly.params, weekly.paths, "feedback/week3.jsonl")
    fourth = retrain(weekly)
    assert (fourth.new_files, fourth.quarantined) == (["feedback/week3.jsonl"], [])


@pytest.mark.slow
def test_untrusted_weeks_can_wait(weekly: Any, caplog: pytest.LogCaptureFixture) -> None:
    edit(weekly, ("retry_delay", "untrusted_rows: wait, untrusted: [feedback/*, users-*], retry_delay"))
    drop(weekly, "week1.jsonl", "first\n")
    drop(weekly, "users-week1.jsonl", "poison\n")
    first = retrain(weekly)
    assert (first.outcome, first.files, first.new_files, first.quarantined) == ("promoted", 1, ["week1.jsonl"], [])
    assert "users-week1.jsonl waits until somebody trusts it" in caplog.text
    assert retrain(weekly).outcome == "unchanged"
    trust(weekly.params, weekly.paths, "users-week1.jsonl")
    assert retrain(weekly).new_files == ["users-week1.jsonl"]


@pytest.mark.slow
@pytest.mark.usefixtures("drifting")
def test_what_was_promoted_in_spite_of_a_doubt_stays_in_doubt_until_somebody_vouches(weekly: Any) -> None:
    """A good week beside it makes the candidate better; its own rows judge no later candidate."""
    drop(weekly, "week1.jsonl", "first\n")
    assert retrain(weekly).outcome == "promoted"
    for name in "abcde":
        drop(weekly, f"week2{name}.jsonl", f"good {name}\n")
    drop(weekly, "week2.jsonl", "poison\n")
    second = retrain(weekly)
    assert (second.outcome, second.quarantined, second.excluded) == ("promoted", ["week2.jsonl"], [])
    drop(weekly, "week3.jsonl", "bad\n")
    third = retrain(weekly)
    assert (third.outcome, third.new_files) == ("kept", ["week3.jsonl"])
    assert (third.quarantined, third.excluded) == (["week2.jsonl"], []), "it was learnt before, so it is not to blame"
    trust(weekly.params, weekly.paths, "week2.jsonl")
    fourth = retrain(weekly)
    assert (fourth.new_files, fourth.quarantined) == (["week2.jsonl"], [])


@pytest.mark.slow
@pytest.mark.usefixtures("drifting")
def test_after_a_refused_and_a_set_aside_week_it_comes_to_rest(weekly: Any) -> None:
    drop(weekly, "week1.jsonl", "first\n")
    assert retrain(weekly).outcome == "promoted"
    drop(weekly, "week2.jsonl", "bad\n")
    assert (retrain(weekly).version, retrain(weekly).outcome) == ("v0.1.1", "unchanged")
    drop(weekly, "week3.jsonl", "poison\n")
    third = retrain(weekly)
    assert (third.version, third.outcome, third.excluded) == ("v0.1.2", "kept", ["week3.jsonl"])
    # what is left is what the refused v0.1.1 has learnt from
    assert retrain(weekly).outcome == "unchanged"


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was told, by the arguments of `notify`."""
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(flow, "notify", lambda *arguments: told.append(arguments))
    return told


def test_parameters_that_are_being_edited_do_not_count(
    weekly: Any, notices: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    edit(weekly, ("retry_delay", "notify: [slack-webhook/team], retry_delay"))
    weekly.paths.params.write_text("data: {source: [half\n")
    (weekly.root / "data" / "new.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"there is no file of rows, nor in retrain\.incoming"):
        retrain(weekly)  # what is committed says so
    assert "committed files only, without data/new.jsonl, params.yaml (`git add data params.yaml && " in caplog.text
    assert [entry.outcome for entry in entries(weekly.paths)] == ["failed"]
    assert notices[0][:2] == (["slack-webhook/team"], "docstrings: retraining failed")

    # committed like this, nothing can be trained, and those of before say who is told
    weekly.git("commit", "--quiet", "--message=Half", "params.yaml")
    with pytest.raises(ParamsError, match=r"params\.yaml:"):
        retrain(weekly)
    assert [entry.outcome for entry in entries(weekly.paths)] == ["failed", "failed"]
    assert "params.yaml:" in entries(weekly.paths)[1].reason
    assert notices[1][:2] == (["slack-webhook/team"], "docstrings: retraining failed")
    assert weekly.paths.retraining_page.read_text().count('class="one"') == 2


def test_what_is_not_taken_is_told_once(weekly: Any, notices: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow.Retraining, "_reasons", lambda *_: [])
    drop(weekly, "week1.jsonl")
    assert (retrain(weekly).skipped, notices) == ({}, [])
    drop(weekly, "week2.json")
    for _ in range(2):
        assert list(retrain(weekly).skipped) == ["week2.json"]
    [(_, subject, body)] = notices
    assert subject == "docstrings: retraining unchanged"
    assert "week2.json in retrain.incoming is skipped: write one row a line as .jsonl" in body
    assert "Skipped: week2.json" in weekly.paths.retraining_page.read_text()


def test_data_that_git_does_not_have_are_named_with_what_to_do(weekly: Any) -> None:
    edit(weekly, (f"incoming: {weekly.incoming}", "incoming: null"))
    (weekly.root / "data" / "rows").mkdir()
    (weekly.root / "data" / "rows" / "week1.jsonl").write_text("first\n")
    with pytest.raises(DataError, match=r"data\.source data/rows is tracked neither by git nor by DVC.*`git add"):
        retrain(weekly)


@pytest.mark.slow
def test_what_colleagues_did_is_taken_in_first(
    weekly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote, colleague = tmp_path / "remote.git", tmp_path / "colleague"
    weekly.git("clone", "--quiet", "--bare", str(weekly.root), str(remote))
    weekly.git("remote", "add", "origin", str(remote))
    drop(weekly, "week1.jsonl", "first\n")
    assert retrain(weekly, "origin").version == "v0.1.0"
    assert set(weekly.git("tag", root=remote).split()) == {"docstrings@v0.1.0", "docstrings#champion#1"}
    # a colleague registers a version, promotes it, and takes it back again
    weekly.git("clone", "--quiet", str(remote), str(colleague))
    theirs = Registry(Git(colleague), "docstrings")
    first = theirs.version("v0.1.0")
    record = {**theirs.record(first), "version": "v0.1.1"}
    second = theirs.register("v0.1.1", "c" * 64, record, {}, "theirs", push_to="origin")
    theirs.assign("champion", second, 1, "theirs\n", push_to="origin")
    theirs.assign("champion", first, 2, "taken back\n", push_to="origin")

    # the race is lost each time, so there is no verdict, and the data are no old ones
    drop(weekly, "week2.jsonl", "second\n")
    original = flow.promote

    def conflict(*_: Any) -> None:
        raise RegistryConflict("another was first")

    monkeypatch.setattr(flow, "promote", conflict)
    with pytest.raises(RegistryConflict):
        retrain(weekly, "origin")
    assert "judging the candidate again" in caplog.text
    monkeypatch.setattr(flow, "promote", original)
    second = retrain(weekly, "origin")
    assert (second.outcome, second.version, second.new_files) == ("promoted", "v0.1.2", [])
    assert "docstrings#champion#4" in weekly.git("tag", root=remote).split()
    assert retrain(weekly, "origin").outcome == "unchanged"


def test_data_come_from_the_newest_version_of_a_retraining(weekly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was registered by hand since then, or by a colleague, has none."""
    work = flow.Retraining(weekly.root, None, False, flow._with_retries, Entry("2026-01-01T00:00:00"))
    versions = [Version(number, number, number, 0, "") for number in ("v0.1.0", "v0.1.1", "v0.1.2")]
    state = SimpleNamespace(versions=lambda: versions, stages=dict)
    monkeypatch.setattr(work.registry, "snapshot", lambda: state)
    monkeypatch.setattr(work.source, "listed_files", lambda one: {} if one.number == "v0.1.2" else {"a": one.number})
    asked: list[Any] = []
    monkeypatch.setattr(work.source, "collect", lambda *arguments: asked.append(arguments))
    work._collect(versions[0])
    before, champion = asked[0][:2]
    assert ([one.number for one in before], champion.number) == (["v0.1.1", "v0.1.2"], "v0.1.0")


def test_a_number_that_another_took_is_left_to_him(weekly: Any, tmp_path: Path) -> None:
    """A colleague registers between our look at the remote and our push."""
    remote = tmp_path / "remote.git"
    weekly.git("clone", "--quiet", "--bare", str(weekly.root), str(remote))
    weekly.git("remote", "add", "origin", str(remote))
    work = flow.Retraining(weekly.root, "origin", False, flow._with_retries, Entry("2026-01-01T00:00:00"))
    tree = type(weekly)(work.tree.root)
    (tree.root / "make.py").write_text("import shutil\nshutil.copytree('source', 'artifacts', dirs_exist_ok=True)\n")
    assert tree.register(loss=2.0)["version"] == "v0.1.0"
    ours = work.registry.version("v0.1.0").commit
    other = ("-c", "user.name=Bob", "-c", "user.email=bob@example.org")
    weekly.git(*other, "tag", "--annotate", "--message=theirs", "docstrings@v0.1.0", root=remote)
    work._take_number("origin")
    assert work.registry.version("v0.1.0").commit == weekly.git("rev-parse", "main", root=remote).strip() != ours
    assert json.loads(tree.paths.version.read_text())["version"] != "v0.1.0"
    assert len(weekly.git("tag", root=remote).split()) == 2


@pytest.mark.slow
def test_a_file_that_changes_nothing_is_tried_once(weekly: Any) -> None:
    """The version that comes of it is there already, with a list of files that lacks it."""
    drop(weekly, "week1.jsonl", "first\n")
    assert retrain(weekly).outcome == "promoted"
    drop(weekly, "week2.jsonl", "nothing\n")
    second = retrain(weekly)
    assert (second.outcome, second.version, second.reason) == (
        "kept",
        "v0.1.0",
        "docstrings v0.1.0 is champion already",
    )
    assert retrain(weekly).outcome == "unchanged"
    drop(weekly, "week3.jsonl", "third\n")
    third = retrain(weekly)
    assert (third.outcome, third.version, third.files) == ("promoted", "v0.1.1", 3)


def test_where_all_is_new_and_strange_it_is_judged_by_itself(weekly: Any, caplog: pytest.LogCaptureFixture) -> None:
    work = flow.Retraining(weekly.root, None, False, flow._with_retries, Entry("2026-01-01T00:00:00"))
    work._quarantine_drifted(drift_of({"a.jsonl": "far off"}), collected_of({"a.jsonl": "0"}))
    assert work.entry.quarantined == [] and work.params.data.quarantined is None
    assert "all files are quarantined" in caplog.text
    work._quarantine_drifted(drift_of({"a.jsonl": "far off"}), collected_of({"a.jsonl": "0", "b.jsonl": "1"}))
    assert work.entry.quarantined == work.params.data.quarantined == ["a.jsonl"]


def test_a_file_that_is_left_out_is_not_named_as_quarantined(weekly: Any) -> None:
    """Its name in the committed params.yaml would be of no file of the working tree."""
    edit(weekly, ("assignment: hashed", "assignment: hashed, quarantined: [a.jsonl, b.jsonl, c.jsonl]"))
    work = flow.Retraining(weekly.root, None, False, flow._with_retries, Entry("2026-01-01T00:00:00"))
    collected = Collected({"a.jsonl": "0", "d.jsonl": "1"}, [], [], ["b.jsonl"], [], ["c.jsonl"], {})
    work._quarantine([], collected)
    assert work.params.data.quarantined == ["a.jsonl"]
    work._quarantine(["d.jsonl"], collected)
    assert work.params.data.quarantined == ["a.jsonl", "d.jsonl"]


def keep_rows(project: Any, kept_by: str) -> Path:
    """Commit two weeks in data/rows, by git alone or by DVC, in place of the incoming folder; returns their folder."""
    rows = project.root / "data" / "rows"
    rows.mkdir()
    for name in ("week1.jsonl", "week2.jsonl"):
        (rows / name).write_text(f"{name}\n")
    if kept_by == "dvc":
        dvc(project.root, "add", "data/rows")
        dvc(project.root, "push", "data/rows.dvc")
    text = project.paths.params.read_text().replace(f"incoming: {project.incoming}", "incoming: null")
    project.paths.params.write_text(text)
    project.git("add", "--all", "data", "params.yaml")
    project.git("commit", "--quiet", "--message=Rows")
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kept_by", ["git", "dvc"])
def test_a_file_that_is_set_aside_is_out_of_tracked_data_as_well(weekly: Any, kept_by: str) -> None:
    rows = keep_rows(weekly, kept_by)
    exclude(weekly.paths, {"week2.jsonl": sha256(rows / "week2.jsonl")}, "by hand")
    told = retrain(weekly)
    assert (told.outcome, told.files) == ("promoted", 1)
    version = Registry(Git(weekly.root), "docstrings").version("v0.1.0")
    dvc(weekly.root, "get", str(weekly.root), "data/rows", "--rev", version.commit, "--out", str(weekly.root / "got"))
    assert [path.name for path in (weekly.root / "got").iterdir()] == ["week1.jsonl"]
    assert sorted(path.name for path in rows.iterdir()) == ["week1.jsonl", "week2.jsonl"], "the user's are as they were"


@pytest.mark.slow
def test_a_failure_is_told_and_the_next_one_goes_on_in_the_same_tree(
    weekly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls, saved = flow.run_stage, [], home(weekly.root) / "tree" / "checkpoints" / "mark"
    working = {"works": False}

    def run_stage(root: Path, stage: str, *rest: Any) -> None:
        calls.append((stage, saved.exists()))
        if not working["works"]:
            saved.parent.mkdir(exist_ok=True)
            saved.touch()
            raise StageError("a cable was pulled")
        original(root, stage, *rest)

    monkeypatch.setattr(flow, "run_stage", run_stage)
    drop(weekly, "week1.jsonl")
    drop(weekly, "week2.jsonl", "odd\n")
    exclude(weekly.paths, {"week2.jsonl": sha256(weekly.incoming / "week2.jsonl")}, "by hand")
    with pytest.raises(StageError, match="a cable was pulled"):
        retrain(weekly)
    assert calls == [("make", False), ("make", True)], "the parameters ask for one retry"
    failed = entries(weekly.paths)[-1]
    assert (failed.outcome, failed.reason, "make" in failed.seconds) == ("failed", "a cable was pulled", True)
    working["works"] = True
    went_on = retrain(weekly)
    assert (went_on.outcome, went_on.files) == ("promoted", 1), "one is excluded"
    assert calls[2] == ("make", True), "what the failed one had saved was there"

    # what was set aside comes back
    with pytest.raises(DataError, match=r"week9.jsonl is neither excluded nor quarantined; .*: week2.jsonl"):
        trust(weekly.params, weekly.paths, "week9.jsonl")
    assert trust(weekly.params, weekly.paths, "week2.jsonl") == [sha256(weekly.incoming / "week2.jsonl")]
    assert read_excluded(weekly.paths) == {}

    # another parameter is a reason only if it is asked for
    edit(weekly, ("5.0e-4", "1.0e-3"))
    (weekly.incoming / "week2.jsonl").unlink()
    assert retrain(weekly).outcome == "unchanged"
    working["works"] = False
    edit(weekly, ("retry_delay", "on: any, retry_delay"))
    with pytest.raises(StageError, match="a cable was pulled"):
        retrain(weekly)

    # from the champion it trains on new files and a share of the others
    edit(weekly, ("on: any", "start: champion, on: data"))
    drop(weekly, "week3.jsonl", "new\n")
    with pytest.raises(StageError, match="a cable was pulled"):
        retrain(weekly)
    assert entries(weekly.paths)[-1].start == "v0.1.0"
    asked = load_params(home(weekly.root) / "tree" / "params.yaml")
    assert (asked.train.start_from, asked.data.new_files, asked.data.replay_share) == ("v0.1.0", ["week3.jsonl"], 0.5)


@pytest.mark.slow
def test_a_retraining_that_was_killed_after_its_promotion_does_not_train_its_own_candidate(
    weekly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(weekly, ("retry_delay", "start: champion, retry_delay"))
    drop(weekly, "week1.jsonl")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(flow, "write_review", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        retrain(weekly)
    after = retrain(weekly)
    assert (after.outcome, after.champion, after.start) == ("unchanged", "v0.1.0", None)
    assert not (home(weekly.root) / "tree").exists() and not is_unfinished(weekly.root)


@pytest.mark.parametrize("kept_by", ["git", pytest.param("dvc", marks=pytest.mark.slow)])
def test_a_file_that_is_trusted_after_a_failure_is_used_by_the_next_retraining(
    weekly: Any, monkeypatch: pytest.MonkeyPatch, kept_by: str
) -> None:
    rows = keep_rows(weekly, kept_by)
    exclude(weekly.paths, {"week2.jsonl": sha256(rows / "week2.jsonl")}, "by hand")
    monkeypatch.setattr(flow.Retraining, "_stages", lambda *_: (_ for _ in ()).throw(StageError("a cable was pulled")))
    for files in (1, 2):
        with pytest.raises(StageError):
            retrain(weekly)
        assert entries(weekly.paths)[-1].files == files
        if files == 1:
            trust(weekly.params, weekly.paths, "week2.jsonl")


def test_one_at_a_time(weekly: Any) -> None:
    with only_one(weekly.root), pytest.raises(BusyError, match=r"runs already \(process \d+ on ") as error:
        retrain(weekly)
    assert error.value.status == 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (("source: data/rows", "source: stdlib:docstrings"), DataError, "has to be a folder below data/"),
        (("source: data/rows", "source: data/../flows"), DataError, "has to be a folder below data/"),
        (("incoming: ", "incoming: /nowhere"), DataError, "there is no folder"),
        (("hashed}", "filled}\ntracking: {mode: disabled}"), ParamsError, "data.assignment: hashed"),
    ],
)
def test_what_does_not_fit_is_said(weekly: Any, change: tuple[str, str], error: Any, words: str) -> None:
    drop(weekly, "week1.jsonl")
    edit(weekly, change, ("retry_delay", "start: champion, retry_delay"))
    with pytest.raises(error, match=words):
        retrain(weekly)
    assert entries(weekly.paths)[-1].outcome == "failed"


@pytest.fixture
def events(weekly: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The events that a receiver of `weekly` got so far; params.yaml is committed."""
    monkeypatch.setenv("PEFTCORE_WEBHOOK_SECRET", "a secret of twenty bytes")
    with receiving() as receiver:
        text = weekly.paths.params.read_text()
        weekly.paths.params.write_text(f"{text}webhooks: {{endpoints: [{{url: '{receiver.url}'}}]}}\n")
        weekly.git("commit", "--quiet", "--all", "--message=Webhooks")
        yield lambda: list(receiver.accepted.values())


@pytest.mark.slow
@pytest.mark.usefixtures("drifting")
def test_candidates_drift_and_verdicts_are_announced(weekly: Any, events: Callable[[], list[dict[str, Any]]]) -> None:
    drop(weekly, "week1.jsonl", "first\n")
    retrain(weekly)
    drop(weekly, "week2.jsonl", "poison\n")
    retrain(weekly)
    told = [(event["type"], event["data"].get("version")) for event in events()]
    assert told == [
        ("candidate", "v0.1.0"),
        ("promotion", "v0.1.0"),
        ("drift", None),
        ("candidate", "v0.1.1"),
        ("refusal", "v0.1.1"),
    ]
    drift = events()[2]["data"]
    assert (drift["champion"], drift["files"], drift["quarantined"]) == (
        "v0.1.0",
        {"week2.jsonl": "far off"},
        ["week2.jsonl"],
    )


def test_a_retraining_that_fails_is_announced_and_one_that_was_killed_by_the_next(
    weekly: Any, events: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        retrain(weekly)  # there is no file of rows
    (failure,) = events()
    assert failure["type"] == "failure" and "there is no file of rows" in failure["data"]["reason"]
    note_unfinished(weekly.root, "2026-01-01T03:00:00+00:00")  # as by a process that was killed then
    monkeypatch.setattr(flow.Retraining, "work", lambda self: None)
    retrain(weekly)
    retrain(weekly)  # it has not come to a verdict since, and is announced once
    assert [
        (event["data"]["started"], event["data"]["reason"]) for event in events()[1:] if "killed" in str(event)
    ] == [("2026-01-01T03:00:00+00:00", "it was killed")]
