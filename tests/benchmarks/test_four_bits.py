"""The four-bit benchmark: what its table says, and a run on a tiny base."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import four_bits
from benchmarks.four_bits_cell import ARMS

SMALL = ("--calibration-rows", "8", "--test-rows", "4", "--rank", "2", "--batch", "4", "--accumulation", "1")


def cell(loss: float, **more: object) -> dict:
    facts = {"calibration_seconds": 1.0, "calibration_memory": 2**20, "machine": "a machine"}
    return {"losses": [loss, loss + 1], "tokens": [3, 1], **facts, **more}


def test_gaps_are_those_to_the_same_base_in_16_bits() -> None:
    losses = {"bf16": 3.0, "nf4": 3.4, "qera": 3.1}
    cells = {f"base.{arm}.untrained": cell(loss) for arm, loss in losses.items()}
    cells |= {f"merged.{arm}.untrained": cell(loss - 1) for arm, loss in losses.items()}
    cells |= {f"base.{arm}.{seed}": cell(losses[arm] - 1, seconds=5.0) for arm in losses for seed in (0, 1)}
    rows = {(row["base"], row["arm"]): row for row in four_bits.untrained(cells)}
    for base in ("base", "merged"):
        assert rows[base, "qera"]["gap"] == pytest.approx(0.1) and rows[base, "qera"]["closed"] == pytest.approx(0.75)
        assert rows[base, "bf16"]["gap"] == 0
    against = {one["arm"]: one["difference"] for one in four_bits.comparisons(cells)}
    assert against == {"nf4": pytest.approx(0.4), "qera": pytest.approx(0.1)}
    assert [(row["base"], row["arm"], len(row["losses"])) for row in four_bits.trained(cells)] == [
        ("base", arm, 2) for arm in losses
    ]


@pytest.mark.proof
def test_all_arms_run_on_a_tiny_base(run_benchmark, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data, base = tmp_path / "data", tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data.mkdir()
    for split in ("train", "test"):
        texts = [tokenizer.encode(f"{n} + 1 = {n + 1}") for n in range(8)]
        rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in texts]
        parquet.write_table(pa.Table.from_pylist(rows), data / f"{split}.parquet")
    given = ("--base", str(base), "--merged", str(base), "--data", str(data), "--folder", str(tmp_path))
    trained = ("--train", "--seeds", "2", "--steps", "1", "--arms", "bf16,qera", "--trained-bases", "base")
    done = run_benchmark("four_bits", *SMALL, *given, *trained, "--cells", str(tmp_path / "cells"))
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "four_bits.json").read_text())
    assert len(measured["untrained"]) == 2 * len(ARMS) and len(measured["trained"]) == 2
    assert "| NF4, QERA | 2 |" in (tmp_path / "four_bits.md").read_text()
