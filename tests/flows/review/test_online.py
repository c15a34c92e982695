"""The online path against a local server that speaks what wandb's SDK asks of one (see support/wandb_server.py).

wandb is started in processes of its own, because it reads its environment once.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import LOSSES, PROMPT, RATES, STEPS, write_runs
from wandb_server import WandbServer

from flows.errors import ReviewError
from flows.review import online
from flows.runtime.tracking import LOGIN_SECONDS

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    """A server that three training runs and their evaluations were tracked at."""
    with WandbServer() as server:
        assert write_runs(tmp_path_factory.mktemp("online"), "online", environment=server.environment()) == 0
        yield server


def command(server: WandbServer, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    everything = {**kept, **server.environment(), "PATH": path, "COLUMNS": "200", **environment}
    return subprocess.run(arguments, cwd=cwd, env=everything, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_what_the_server_was_told(server: WandbServer) -> None:
    assert server.unknown == [], "nothing was asked that is not imitated"
    trained = {run.name: run for run in server.runs.values() if run.told["jobType"] == "train"}
    assert sorted(run.told["displayName"] for run in trained.values()) == sorted(RATES)
    for run in trained.values():
        assert (run.exit_code, len(run.history)) == (0, STEPS)
        assert json.loads(run.config)["train"]["value"]["batch_size"] == 8
        assert any("system.proc.memory.rssMB" in row for row in run.events)
    evaluations = [run for run in server.runs.values() if run.told["jobType"] == "evaluate"]
    assert len(evaluations) == len(trained) == 3
    for run in evaluations:
        of = trained[json.loads(run.config)["evaluates"]["value"]]
        assert run.told["groupName"] == of.told["groupName"] == of.name
    assert sorted(told["artifactTypeName"] for told in server.artifacts) == ["adapter"] * 3 + ["run_table"] * 3
    assert all(
        len(name) < 300 and b"weights" not in content for run in trained.values() for name, content in run.files.items()
    )


@pytest.mark.slow
def test_a_project_is_read_back_and_compared(server: WandbServer, tmp_path: Path) -> None:
    done = command(server, "peftcore", "review", "--project", "ada/docs", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [run["name"] for run in told["runs"]] == sorted(LOSSES, key=lambda name: LOSSES[name])
    best = told["runs"][0]
    assert (best["headlines"]["test loss"], best["steps"], best["samples"]) == (2.5, STEPS, 1)
    assert best["version"] == "v0.1.1"
    assert told["differing"] == ["train.learning_rate"] and best["warnings"] == []
    page = Path(told["page"]).read_text()
    assert page.count("<svg") == 4 and PROMPT in page


@pytest.mark.proof
def test_one_run_is_read_by_its_id(server: WandbServer, tmp_path: Path) -> None:
    name = next(run.name for run in server.runs.values() if run.told["jobType"] == "train")
    done = command(server, "peftcore", "review", f"wandb:ada/docs/{name}", "--json", cwd=tmp_path)
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["id"], run["where"]) == (name, f"wandb:ada/docs/{name}")


@pytest.mark.parametrize("path", ["ada", "a/b/c/d", "ada//x", ""])
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(ReviewError, match="give wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID"):
        online.read(path)


@pytest.mark.slow
def test_a_project_that_is_not_there_is_one_message(server: WandbServer, tmp_path: Path) -> None:
    done = command(server, "peftcore", "review", "wandb:ada/nothing", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message.startswith("error: wandb:ada/nothing cannot be read:")
    assert "Traceback" not in done.stderr


@pytest.mark.proof
def test_a_server_that_is_down_costs_its_time_and_no_more(tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    script = "from pathlib import Path; from flows.runtime.tracking import Tracker; "
    script += "t = Tracker('d', 'online', {}, Path.cwd()); "
    script += "t.log({'step': 1, 'loss': 2.0}); t.finish({})"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=90)
    assert time.monotonic() - started < 4 * LOGIN_SECONDS, "its own limit, and what starting takes on a busy machine"
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


TRACKED_STAGE = """
import json, shutil
from pathlib import Path
from flows.params import load_params
from flows.runtime.tracking import Tracker

shutil.copytree("source", "artifacts", dirs_exist_ok=True)
params = load_params(Path("params.yaml"))
tracker = Tracker(params.tracking.project, params.tracking.mode, params.model_dump(), Path.cwd())
identity = tracker.run_id
tracker.log({"step": 1, "validation_loss": 2.0 + params.train.learning_rate})
tracker.finish({"best_validation_loss": 2.0 + params.train.learning_rate})
summary = Path("artifacts/training/summary.json")
summary.write_text(json.dumps(json.loads(summary.read_text()) | {"wandb_run_id": identity}))
"""


@pytest.mark.proof
def test_an_agent_of_a_sweep_runs_trials_whose_runs_are_compared(project: Any, tmp_path: Path) -> None:
    """W&B's own `wandb sweep` and `wandb agent` with the committed file, cut down to two trials."""
    text = (Path(__file__).parents[3] / "sweeps" / "learning-rate.yaml").read_text()
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(text.replace("[2.0e-4, 5.0e-4, 1.0e-3]", "[2.0e-4, 5.0e-4]").replace("[8, 16]", "[8]"))

    (project.root / "make.py").write_text(TRACKED_STAGE)
    params = "train: {learning_rate: 0.1}\nmethod: {r: 4}\ntracking: {mode: offline}\n"
    project.paths.params.write_text(project.paths.params.read_text() + params)
    dvc_yaml = project.root / "dvc.yaml"
    reads = "  make:\n    params: [train, method, tracking]\n"
    dvc_yaml.write_text(dvc_yaml.read_text().replace("  make:\n", reads, 1))
    project.git("commit", "--quiet", "--all", "--message=Track")
    with WandbServer() as server:
        made = command(server, "wandb", "sweep", "--project", "docs", "--entity", "ada", str(sweep), cwd=project.root)
        assert "wandb agent ada/docs/sweep1" in made.stderr, made.stderr
        ran = command(server, "wandb", "agent", "ada/docs/sweep1", cwd=project.root)
        assert ran.returncode == 0, ran.stderr
        assert server.unknown == []
        trained = [run for run in server.runs.values() if run.told["jobType"] == "train"]
        assert [run.name for run in trained] == ["agents1", "agents2"], "the ids that the agent gave"
        assert {run.told["sweep"] for run in trained} == {"sweep1"}
        evaluated = [run for run in server.runs.values() if run.told["jobType"] == "evaluate"]
        assert len(evaluated) == 2 and not any(run.told.get("sweep") for run in evaluated)
        done = command(server, "peftcore", "review", "wandb:ada/docs", "exp:", "--json", cwd=project.root)
    told = json.loads(done.stdout)
    rates = [(run["where"].split(":")[0].split()[0], run["config"]["train.learning_rate"]) for run in told["runs"]]
    assert sorted(rates) == [("experiment", 2e-4), ("experiment", 5e-4), ("wandb", 2e-4), ("wandb", 5e-4)]
    assert [run["headlines"]["test loss"] for run in told["runs"]] == [2.7] * 4, told["runs"]
    assert project.git("tag", "--list") == ""
