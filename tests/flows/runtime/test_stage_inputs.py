"""Inputs that change while a stage runs; DVC would record their new state."""

from pathlib import Path

import pytest

from flows.runtime import stage_inputs as module
from flows.runtime.stage_inputs import changed_inputs, stage_inputs

DVC_YAML = """\
stages:
  train:
    params: [train.epochs, method, {other.yaml: [a], whole.yaml: null}]
    deps: [rows.jsonl, folder, absent]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    texts = {
        "dvc.yaml": DVC_YAML,
        "params.yaml": "train: {epochs: 1, seed: 2}\nmethod: {r: 4}\n",
        "other.yaml": "a: 1\nb: 2\n",
        "whole.yaml": "c: 1\n",
        "rows.jsonl": "{}\n",
        "folder/one": "1",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "changed"),
    [
        ("params.yaml", "train: {epochs: 1, seed: 3}\nmethod: {r: 4}\ngate: {}\n", []),
        ("params.yaml", "train: {epochs: 2}\nmethod: {r: 4}\n", ["train.epochs of params.yaml"]),
        ("params.yaml", "train: {epochs: [", ["train.epochs of params.yaml", "method of params.yaml"]),
        ("other.yaml", "a: 1\n", []),
        ("other.yaml", "a: 2\n", ["a of other.yaml"]),
        ("whole.yaml", "c: 2\n", ["whole.yaml"]),
        ("rows.jsonl", "{}\n", []),
        ("rows.jsonl", "{ }\n", ["rows.jsonl"]),
        ("folder/two", "2", ["folder"]),
        ("folder/__pycache__/two.pyc", "2", []),
        ("absent", "3", ["absent"]),
    ],
)
def test_only_what_the_stage_reads_counts(root: Path, file: str, text: str, changed: list[str]) -> None:
    before = stage_inputs(root, "train")
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(text)
    assert changed_inputs(before, stage_inputs(root, "train")) == changed


def test_large_files_are_compared_by_size_and_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_HASHED", 0)
    before = stage_inputs(root, "train")
    (root / "rows.jsonl").write_text("{}\n\n")
    assert changed_inputs(before, stage_inputs(root, "train")) == ["rows.jsonl"]


def test_a_process_that_is_no_stage_has_no_inputs(root: Path) -> None:
    assert stage_inputs(root, "") == stage_inputs(root / "folder", "train") == {}
