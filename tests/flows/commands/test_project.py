"""The commands init and upgrade, and a whole pipeline in a folder of its own."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import peftcore

from flows.params import load_params
from flows.project import outdated
from flows.runtime.stage_code import FILE

ROOT = Path(__file__).parents[3]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."}) for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def test_init_says_what_it_wrote_and_what_comes_next(rows: Path, tmp_path: Path) -> None:
    done = peftcore("init", str(tmp_path / "My tickets"), "--data", str(rows), "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["name"] == "my-tickets" and {"params.yaml", "dvc.yaml", "data/rows.jsonl"} <= set(result["files"])
    again = peftcore("init", str(tmp_path / "My tickets"), "--data", str(rows), "--force")
    assert again.exit_code == 0, again.stderr
    assert "peftcore run" in again.stdout
    (step,) = [line for line in again.stdout.splitlines() if line.startswith("  cd ")]
    assert shlex.split(step) == ["cd", str(tmp_path / "My tickets")]


def test_files_of_parameters_describe_the_project_and_a_later_one_wins(rows: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("project: {name: sums}\ndata: {source: rows.jsonl}\ntrain: {max_steps: 9, epochs: 2.0}\n")
    second.write_text("train: {max_steps: 2}\n")
    folder = tmp_path / "new"
    done = peftcore("init", str(folder), "--params", str(first), "--params", str(second), "--json")
    assert done.exit_code == 0, done.stderr
    params = load_params(folder / "params.yaml")
    assert json.loads(done.stdout)["name"] == params.project.name == "sums"
    assert (params.train.max_steps, params.train.epochs, params.data.source) == (2, 2.0, "data/rows.jsonl")
    named = peftcore("init", str(tmp_path / "other"), "--params", str(first), "--name", "adds")
    assert named.exit_code == 0 and load_params(tmp_path / "other" / "params.yaml").project.name == "adds"
    missing = peftcore("init", str(tmp_path / "none"), "--params", str(second))
    assert missing.exit_code == 1 and "--data FILE" in missing.stderr


def test_files_are_utf_8_in_every_locale(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text('data: {system_prompt: "Für 東京."}\n', encoding="utf-8")
    command = [sys.executable, "-m", "flows", "init", "new", "--data", "rows.jsonl", "--params", "small.yaml"]
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert load_params(tmp_path / "new" / "params.yaml").data.system_prompt == "Für 東京."


def test_init_warns_of_a_missing_gpu_and_of_rows_that_are_there_twice(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.commands.project.hardware_here", lambda: "cpu")
    monkeypatch.chdir(tmp_path)
    done = peftcore("init", "--data", "rows.jsonl", "--hardware", "gpu")
    assert done.exit_code == 0, done.stderr
    assert "no NVIDIA GPU; run the project on one that has, or use --hardware cpu" in caplog.text
    assert "rows.jsonl was copied to data/rows.jsonl" in caplog.text
    other = peftcore("init", "other", "--data", "data/rows.jsonl", "--hardware", "cpu", "--json")
    assert other.exit_code == 1 and "is inside of the project" in other.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--data FILE"),
        (["--data", "{rows}", "--task", "poetry"], "chat, text, preference, unpaired_preference, classification"),
        (["--data", "{rows}", "--task", "chatt"], "got 'chatt'; did you mean chat?"),
        (["--data", "{rows}", "--hardware", "tpu"], "cpu, gpu"),
        (["--data", "{rows}", "--base", "path:gone"], "--base path:gone: there is no "),
    ],
)
def test_init_refuses_what_it_cannot_use(options: list[str], said: str, rows: Path, tmp_path: Path) -> None:
    done = peftcore("init", str(tmp_path / "some" / "new"), *(option.format(rows=rows) for option in options))
    assert done.exit_code == 1 and said in done.stderr
    assert not (tmp_path / "some").exists()


def test_a_file_of_parameters_may_need_values_of_other_options(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("train: {objective: dpo}\n")
    given = ("--data", str(rows), "--params", str(tmp_path / "some.yaml"))
    done = peftcore("init", str(tmp_path / "pairs"), "--task", "preference", *given)
    assert done.exit_code == 0, done.stderr
    assert load_params(tmp_path / "pairs" / "params.yaml").train.objective == "dpo"
    chats = peftcore("init", str(tmp_path / "chats"), "--task", "chat", *given)
    assert chats.exit_code == 1 and "data.kind: 'chat' does not fit; train.objective dpo needs" in chats.stderr
    assert "params.yaml:" not in chats.stderr.replace("a valid params.yaml:", "")  # no line of a file that is not there


def test_upgrade_shows_a_difference_and_writes_it(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peftcore("init", str(tmp_path / "new"), "--data", str(rows))
    monkeypatch.chdir(tmp_path / "new")
    assert peftcore("upgrade").exit_code == 0
    pipeline = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(pipeline.replace("artifacts/merged", "artifacts/whole"))
    shown = peftcore("upgrade")
    assert shown.exit_code == 1 and "+      - artifacts/merged" in shown.stdout and "--write" in shown.stderr
    assert "not up to date with the installed version: dvc.yaml;" in shown.stderr
    assert peftcore("upgrade", "--write").exit_code == 0
    assert Path("dvc.yaml").read_text() == pipeline


def test_unknown_parameters_of_another_version_name_the_version(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peftcore("init", str(tmp_path / "new"), "--data", str(rows))
    monkeypatch.chdir(tmp_path / "new")
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "distillery: {}\n")
    Path(FILE).write_text(Path(FILE).read_text().replace('peftcore: "source"', 'peftcore: "9.9"'))
    monkeypatch.setattr(outdated, "installed_version", lambda: "0.2.0")
    done = peftcore("status")
    assert done.exit_code == 1 and "distillery: unknown key" in done.stderr
    assert "peftcore 0.2.0 is installed, and this project last ran with 9.9" in done.stderr


def test_a_pipeline_of_an_older_version_is_said_by_status_and_before_a_stage_runs(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peftcore("init", str(tmp_path / "new"), "--data", str(rows))
    monkeypatch.chdir(tmp_path / "new")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("      - data.special_tokens\n", ""))
    for command in ("init", "add --all", "-c user.name=A -c user.email=a@example.org commit --quiet --message Start"):
        subprocess.run(["git", *command.split()], check=True, capture_output=True)
    (hint,) = json.loads(peftcore("status", "--no-stages", "--json").stdout)["hints"]
    assert "outputs of fetch, train," in hint and "`peftcore upgrade --write` writes it" in hint
    monkeypatch.setattr("flows.runtime.stage_process.run_stage", lambda *_: None)
    assert peftcore("stage", "fetch").exit_code == 0 and hint in caplog.text


def test_upgrade_is_for_projects_of_init(here: Any) -> None:
    done = peftcore("upgrade")
    assert done.exit_code == 1 and f"no {FILE}" in done.stderr


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "place",
    [
        pytest.param("tickets", marks=pytest.mark.slow),
        pytest.param("repository/projects/tickets", marks=pytest.mark.proof),
    ],
)
def test_a_pipeline_runs_in_a_folder_of_its_own(place: str, rows: Path, tiny_base: Path, tmp_path: Path) -> None:
    """From init to a registered version, then once more with nothing to do, and by DVC alone."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if "projects" in place:
        subprocess.run(["git", "init", "--quiet", str(tmp_path / "repository")], check=True)

    def run(*command: str | Path, code: int = 0) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        imported = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "without_peft")])
        environment = os.environ | {"PATH": path, "PYTHONPATH": imported, "PREFECT_HOME": str(tmp_path / "prefect")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    flows = (sys.executable, "-m", "flows")
    peftcore("init", str(folder), "--data", str(rows), "--base", f"path:{tiny_base}")
    text = (folder / "params.yaml").read_text()
    for old, new in (("control:", "latency_rows: 0\n  control:"), ("source: stdlib:topics", "source: null")):
        text = text.replace(old, new, 1)
    lines = [line for line in text.splitlines(True) if not line.startswith("  latency_rows: 4")]
    (folder / "params.yaml").write_text("".join(lines).replace("max_forgetting: 0.2", "max_forgetting: null"))
    run("git", "add", "--all")
    run("git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", "commit", "--quiet", "--message", "Start")
    run(*flows, "run", code=3)  # the gate refuses what a random base learns in a few steps
    assert run("git", "tag").split() == ["tickets@v0.1.0"]
    assert "no stage has changed" in run(*flows, "run", code=3)
    assert "up to date" in run(sys.executable, "-m", "dvc", "repro")
    assert (folder / "reports" / "review.html").is_file()
