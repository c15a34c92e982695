"""Entries of `evaluate.benchmarks`: what they may name, and what a wrong entry is told."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import Benchmark


def test_a_text_is_a_task(tmp_path: Path) -> None:
    entries = read(tmp_path, "evaluate: {benchmarks: [arc_easy, {task: data/quiz.yaml, limit: 5}]}").evaluate.benchmarks
    assert [(one.name, one.is_file, one.limit) for one in entries] == [("arc_easy", False, None), ("quiz", True, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tsk: a}", "0.tsk: unknown key; did you mean task?"),
        ("quiz.yaml", "0.task: 'quiz.yaml' does not fit; give data/FILE.yaml"),
        ("data/../quiz.yaml", "0.task: 'data/../quiz.yaml' does not fit"),
        ("arc easy", "0.task: 'arc easy' does not fit; give the name of a task, or data/FILE.yaml"),
        ("quiz, data/quiz.yaml", "1.task: 'data/quiz.yaml' does not fit; another benchmark is called quiz"),
        ("{task: a, limit: 0}", "0.limit: 0 does not fit; give a number of at least 1"),
    ],
)
def test_a_wrong_entry_is_told_what_fits(tmp_path: Path, text: str, message: str) -> None:
    assert f"evaluate.benchmarks.{message}" in refusal(tmp_path, f"evaluate: {{benchmarks: [{text}]}}")


def test_a_classifier_has_no_benchmarks(tmp_path: Path) -> None:
    text = "data: {source: a.jsonl, kind: classification}\ntrain: {objective: classification}\n"
    assert "which generates no text" in refusal(tmp_path, text + "evaluate: {benchmarks: [arc_easy]}")


def test_the_identity_has_the_files_that_the_task_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quiz.yaml").write_text("dataset_kwargs: {data_files: {test: data/quiz.jsonl}}")
    entry = Benchmark(task="data/quiz.yaml")
    before = entry.identity(tmp_path)
    assert before["files"]["data/quiz.jsonl"] is None
    (tmp_path / "data" / "quiz.jsonl").write_text("{}")
    after = entry.identity(tmp_path)
    assert after != before and list(after["files"]) == ["data/quiz.jsonl", "data/quiz.yaml"]
    assert Benchmark(task="arc_easy").identity(tmp_path)["files"] == {}


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "benchmarks-in-the-gate.md").read_text()
    entries = read(tmp_path, page.partition("```yaml")[2].partition("```")[0]).evaluate.benchmarks
    assert [(one.name, one.num_fewshot, one.limit, one.metric) for one in entries] == [
        ("arc_easy", None, None, None),
        ("quiz", 5, 200, "acc_norm"),
    ]
