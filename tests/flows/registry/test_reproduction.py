"""A version rebuilt from its own commit: by its own code, from its own inputs, and compared byte by byte."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

from flows.cli import app
from flows.commands.registry import _print_reproduction  # pyright: ignore[reportPrivateUsage]
from flows.errors import DataError, RegistryError
from flows.registry import reproduction
from flows.registry.reproduction import PARTS, largest_difference, reproduce, without_times
from flows.runtime.project import dvc

pytestmark = pytest.mark.usefixtures("forked_stages")
OWN = "flows/stages/make.py"
FETCH = """\
  fetch:
    cmd: test ! -e {seen} && touch {seen} && mkdir -p artifacts/base && echo weights > artifacts/base/model
    outs: [artifacts/base]
"""


COPY = "import shutil\nshutil.copytree('source', 'artifacts', dirs_exist_ok=True)\n"


def rebuild(project: Any) -> Any:
    return reproduce(project.params, project.paths, "v0.1.0", 60.0)


def peftcore(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def commit(project: Any, name: str, text: str) -> None:
    (project.root / name).write_text(text)
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Change")


@pytest.fixture
def fetched(project: Any, tmp_path: Path) -> Any:
    """The project with a stage `fetch` that works once, and a stage `make` that needs it and is a module of its own."""
    code = project.root / OWN
    code.parent.mkdir(parents=True)
    (project.root / "flows" / "__init__.py").touch()
    (code.parent / "__init__.py").touch()
    code.write_text((project.root / "make.py").read_text() + "print('base:', open('artifacts/base/model').read())\n")
    yaml = project.root / "dvc.yaml"
    text = yaml.read_text().replace("cmd: exec python make.py", "cmd: exec python -m flows.stages.make")
    text = text.replace("[source, make.py]", "[source, flows/stages, artifacts/base]")
    yaml.write_text(text.replace("stages:\n", "stages:\n" + FETCH.format(seen=tmp_path / "fetched"), 1))
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=Own code")
    dvc(project.root, "repro", "--quiet", "fetch")
    return project


def test_it_runs_the_commits_own_code_on_what_was_fetched_and_leaves_the_users_files(fetched: Any) -> None:
    fetched.register()
    (fetched.root / OWN).write_text("raise SystemExit('the code of today')\n")
    (fetched.root / "source" / "merge.json").write_text("edited")
    files = {path: path.read_bytes() for path in fetched.root.rglob("*") if path.is_file() and ".git" not in path.parts}
    cache = set((fetched.root / ".dvc" / "cache").rglob("*"))

    found = rebuild(fetched)

    assert (found.version, found.stages, found.same) == ("v0.1.0", ["make"], True)
    assert {one.name for one in found.adapter} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(one.same for part in (found.adapter, found.evidence, found.outs, found.metrics) for one in part)
    assert {one.name for one in found.metrics} >= {"adapter.loss", "merge.kl", "training.steps"}
    assert not {"training.seconds", "adapter.tokens_per_second"} & {one.name for one in found.metrics}
    assert found.other == []
    assert set((fetched.root / ".dvc" / "cache").rglob("*")) == cache
    assert all(path.read_bytes() == content for path, content in files.items() if ".dvc/tmp" not in str(path))
    assert fetched.git("worktree", "list").count("\n") == 1


@pytest.mark.slow
def test_what_was_fetched_comes_from_the_remote_where_the_cache_has_lost_it(fetched: Any) -> None:
    fetched.register()
    (fetched.root / ".dvc" / "cache").rename(fetched.root / "cache-away")
    assert rebuild(fetched).same
    (fetched.root / ".dvc" / "cache" / "files").rename(fetched.root / "cache-away-again")
    (fetched.root / ".dvc-remote").rename(fetched.root / "remote-away")
    with pytest.raises(RegistryError, match="the inputs of the version are not available"):
        rebuild(fetched)


def test_inputs_with_names_beyond_ascii_are_taken_from_dvc(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "data").mkdir()
    commit(project, "data/größe \u2028.jsonl.dvc", "outs: []\n")
    pulled: list[str] = []
    monkeypatch.setattr(reproduction, "dvc", lambda _, *arguments: pulled.extend(arguments))
    reproduction._take_inputs(project.paths, {})
    assert pulled == ["pull", "data/größe \u2028.jsonl.dvc"]


def test_a_version_that_was_registered_without_its_data_says_how_to_keep_them(project: Any) -> None:
    """Git ignores the rows, so the version's commit could not take them along."""
    project.paths.params.write_text(project.paths.params.read_text() + "data: {source: data/qa.jsonl}\n")
    (project.root / "data").mkdir()
    (project.root / "data" / "qa.jsonl").write_text("{}\n")
    commit(project, ".gitignore", (project.root / ".gitignore").read_text() + "/data/\n")
    project.register()
    with pytest.raises(
        DataError,
        match=r"data\.source data/qa\.jsonl is tracked neither by git nor by DVC, so docstrings@v0\.1\.0, which was "
        r"registered without it, does not have it; `git add data/qa\.jsonl`, or `dvc add data/qa\.jsonl`",
    ):
        rebuild(project)
    assert project.git("worktree", "list").count("\n") == 1


@pytest.mark.slow
def test_another_adapter_is_told_with_its_largest_difference_and_what_was_another_then(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(project, "make.py", COPY + "import os, sys\nsys.path.insert(0, os.environ['SUPPORT'])\nimport drift\n")
    support = project.root.parent / "support"
    support.mkdir()
    (support / "drift.py").write_text("")
    monkeypatch.setenv("SUPPORT", str(support))
    project.register()
    (support / "drift.py").write_text(
        "import json, numpy\nfrom pathlib import Path\nfrom safetensors.numpy import load_file, save_file\n"
        "from peftcore.files import write_manifest\n"
        "path = Path('artifacts/adapter/adapter_model.safetensors')\ntensors = load_file(path)\n"
        "tensors['layer.lora_A.weight'][1, 2] += 0.25\nsave_file(tensors, path)\nwrite_manifest(path.parent)\n"
        "path = Path('artifacts/evaluation/metrics.json')\nvalue = json.loads(path.read_text())\n"
        "value['adapter']['loss'] += 1\nvalue['adapter']['tokens_per_second'] = 7\npath.write_text(json.dumps(value))\n"
        "path = Path('artifacts/training/summary.json')\nvalue = json.loads(path.read_text())\n"
        "value['seconds'] = 1\npath.write_text(json.dumps(value))\n"
    )
    monkeypatch.setattr("flows.registry.lineage.python_version", lambda: "3.0")
    found = rebuild(project)
    assert not found.same
    weights = next(one for one in found.adapter if one.name == "adapter_model.safetensors")
    assert (weights.same, weights.detail) == (False, "largest difference 0.25, in layer.lora_A.weight")
    outs = {one.name: (one.same, one.detail) for one in found.outs}
    assert outs["artifacts/training"] == (True, "equal except for times")
    assert outs["artifacts/data"] == (True, "")
    assert outs["artifacts/evaluation"] == (False, "metrics.json (another content)")
    evidence = {one.name: one.same for one in found.evidence}
    assert evidence == {
        "artifacts/evaluation/control.parquet": True,
        "artifacts/evaluation/metrics.json": False,
        "artifacts/evaluation/rows.parquet": True,
        "artifacts/merge.json": True,
    }
    assert [one.name for one in found.metrics if not one.same] == ["adapter.loss"]
    assert [one[0] for one in found.other] == ["python"]
    assert "python was" in found.sentence


def test_as_a_command_with_a_stage_that_fails_in_the_end(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    commit(project, "make.py", COPY + "import os\nraise SystemExit(int(os.environ.get('FAIL', 0)))\n")
    project.register()
    done = peftcore("reproduce", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["same"] is True
    unknown = peftcore("reproduce", "v0.1.0", "--until", "trian")
    assert (unknown.exit_code, "give one of make" in unknown.stderr) == (1, True)
    monkeypatch.setenv("FAIL", "1")
    failed = peftcore("reproduce")
    assert (failed.exit_code, "stage make failed" in failed.stderr) == (1, True)
    assert project.git("worktree", "list").count("\n") == 1


def test_the_note_of_a_row_is_in_a_table_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = SimpleNamespace(
        name="a" * 34, registered="1" * 64, rebuilt="2" * 64, same=True, detail="equal except for times"
    )
    shown = SimpleNamespace(version="v0.1.0", same=True, sentence="same", **{part: [row] for part in PARTS})
    _print_reproduction(shown)  # pyright: ignore[reportArgumentType]
    assert "equal except" in capsys.readouterr().out


def test_times_are_no_results(tmp_path: Path) -> None:
    for name, before, after in (
        ("a.json", '{"seconds": 1, "x": [{"token_ms": 2, "y": 3}]}', '{"x": [{"y": 3}], "seconds": 9}'),
        ("a.jsonl", '{"step": 1, "seconds": 1}\n{"step": 2}\n', '{"step": 1, "seconds": 2}\n{"step": 2}\n'),
    ):
        path = tmp_path / name
        path.write_text(before)
        then = without_times(path)
        path.write_text(after)
        assert without_times(path) == then
    path.write_text('{"step": 1}\n{"step": 3}\n')
    assert without_times(path) != then
    (tmp_path / "a.json").write_text("{")
    assert without_times(tmp_path / "a.json") == b"{"


def test_the_largest_difference_by_type(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    base = numpy.ones((2, 3), numpy.float32)
    save_file({"a": base, "b": base}, one)
    save_file({"a": base, "b": base + 0.5}, other)
    assert largest_difference(one, other) == "largest difference 0.5, in b"
    save_file({"a": base}, other)
    assert largest_difference(one, other) == "other tensors or other shapes"
    other.write_bytes(b"no")
    assert largest_difference(one, other).startswith("not readable")
    import torch
    from safetensors.torch import save_file as save_torch

    save_torch({"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, one)
    save_torch({"a": torch.tensor([1.0, 2.5], dtype=torch.bfloat16)}, other)
    assert largest_difference(one, other) == "largest difference 0.5, in a"
    save_torch({"a": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)}, other)
    assert largest_difference(one, other) == "largest difference inf, in a"
