"""Sections `evaluate` and `merge`: counts of rows that fit into each other, and sources of a control set."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import Control, Evaluate


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("evaluate: {rows: 8, generate_rows: 9, samples: 1}", "evaluate.generate_rows"),
        ("evaluate: {generate_rows: 3, samples: 4}", "evaluate.samples"),
        ("evaluate: {rows: 0}", "evaluate.rows"),
        ("evaluate: {latency_rows: -1}", "evaluate.latency_rows"),
        ("evaluate: {control: {source: ''}}", "evaluate.control.source"),
        ("evaluate: {control: {rows: 1}}", "evaluate.control.rows"),
        ("evaluate: {control: {max_length: 7}}", "evaluate.control.max_length"),
        ("merge: {max_kl: -0.1}", "merge.max_kl"),
        ("merge: {min_top1_agreement: 1.1}", "merge.min_top1_agreement"),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert refusal(tmp_path, text).startswith(f"params.yaml:1: {key}: ")


def test_all_rows_are_enough_for_any_number_of_answers() -> None:
    assert Evaluate(rows=None, generate_rows=10_000).generate_rows == 10_000
    assert Evaluate(rows=8, generate_rows=8, samples=8).samples == 8


@pytest.mark.parametrize("source", ["stdlib:topics", "a.jsonl", "texts/a.txt", "null"])
def test_each_kind_of_control_set_is_taken(tmp_path: Path, source: str) -> None:
    control = read(tmp_path, f"evaluate: {{control: {{source: {source}}}}}").evaluate.control
    assert control == Control(source=None if source == "null" else source)


@pytest.mark.parametrize("source", ["stdlib:docstrings", "hub:a/b.txt", "a.csv", "'.txt'", "s3://a/b.txt"])
def test_another_control_set_is_refused_with_those_that_fit(tmp_path: Path, source: str) -> None:
    told = refusal(tmp_path, f"evaluate: {{control: {{source: {source}}}}}")
    assert told.endswith("does not fit; give stdlib:topics, the path of a .jsonl or .txt, or null")
