"""The precision benchmark trains all on the same batches from the same adapter, and says what it measured."""

import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase


@pytest.mark.proof
def test_each_precision_trains_alike_and_the_rest_is_kept(
    run_benchmark, tiny_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = []
    for number in range(8):
        ids = [*tokenizer("ask " * (1 + number % 3) + f"{number} answer")["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    for split in ("train", "validation"):
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    given = ("--base", str(tiny_base), "--data", str(tmp_path), "--folder", str(tmp_path / "out"), "--steps", "2")
    for precision in ("fp16", "fp32"):
        done = run_benchmark("precision", *given, "--batch", "2", "--held-out", "4", "--only", precision)
        assert done.returncode == 0, done.stderr
    sides = json.loads((tmp_path / "out/precision.json").read_text())["sides"]
    assert [side["precision"] for side in sides] == ["fp32", "fp16"]
    assert [side["loss_scale"] for side in sides] == [None, 65536]
    assert sides[1]["losses"] == pytest.approx(sides[0]["losses"], rel=0.01)
    assert all(side["peak_memory"] >= side["loaded_memory"] > 2**20 for side in sides)
    table = (tmp_path / "out/precision.md").read_text()
    assert "| fp32 |" in table and "| fp16 |" in table
    assert (tmp_path / "out/precision.png").read_bytes().startswith(b"\x89PNG")
