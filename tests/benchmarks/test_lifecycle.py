"""The lifecycle benchmark measures both sides, writes its results and draws them; how fast anything is, is no test."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.proof
def test_table_figures_and_picture(run_benchmark, tmp_path: Path) -> None:
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    base.save_pretrained(tmp_path / "base")
    small = ("--base", "base", "--blocks", "1", "--points", "2,4", "--folder", "out")
    done = run_benchmark("lifecycle", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/lifecycle.json").read_text())["rows"]
    assert {(row["operation"], row["loaded"]) for row in rows} >= {
        ("add the first adapter", 0),
        ("load one more adapter", 2),
        ("load one more adapter", 4),
        ("disable_adapter, in and out", 4),
        ("SmolLM2-135M bf16: merge_adapter", 0),
    }
    assert all(len(row["ours"]) == len(row["peft"]) >= 7 for row in rows)
    assert (tmp_path / "out/lifecycle.md").read_text() + "\n" == done.stdout
    (tmp_path / "out/lifecycle.png").unlink()
    assert run_benchmark("lifecycle", "--draw", "--folder", "out").returncode == 0
    assert (tmp_path / "out/lifecycle.png").stat().st_size > 1000


@pytest.mark.proof
def test_too_few_repeats_and_a_start_elsewhere_are_refused(run_benchmark) -> None:
    for options, message in ((("--repeats", "3"), "at least 7"), (("--points", "5,10"), "the least of them 2")):
        done = run_benchmark("lifecycle", *options)
        assert done.returncode == 2
        assert message in done.stderr
