"""The combining benchmark measures both sides of every kind; how fast anything is, is no test."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.proof


def test_a_row_for_each_kind(run_benchmark, tmp_path: Path) -> None:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    done = run_benchmark("combine", "--base", "base", "--folder", "out")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out/combine.md").read_text().splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    assert set(rows) == {"kind", "svd", "cat", "linear", "ties"}
    assert all(line.count("|") == rows["kind"].count("|") for line in rows.values())
    assert "medians of 7 rounds" in lines[0] and "on 7 linear layers" in lines[0]


def test_too_few_repeats_are_refused(run_benchmark) -> None:
    done = run_benchmark("combine", "--repeats", "3")
    assert done.returncode == 2 and "at least 7" in done.stderr
