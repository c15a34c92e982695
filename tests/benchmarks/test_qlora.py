"""The QLoRA benchmark: what its intervals say, cells that are kept, and a run on a tiny base."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import qlora
from benchmarks.cells import write
from benchmarks.qlora_cell import Setting

SMALL = ("--train-rows", "8", "--test-rows", "4", "--rank", "2", "--batch", "4", "--accumulation", "1", "--seeds", "2")


def cell(losses: list[float]) -> dict:
    return {"losses": losses, "tokens": [2, 1, 1]}


@pytest.fixture
def data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder of splits whose rows are sums."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        texts = [tokenizer.encode(f"{n} + 1 = {n + 1}") for n in range(8)]
        rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in texts]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


@pytest.mark.proof
def test_cells_are_measured_once_and_tabulated(run_benchmark, tmp_path: Path, tiny_base: Path, data: Path) -> None:
    setting = Setting(tiny_base, data, train_rows=8, test_rows=4, rank=2, learning_rate=5e-4, batch=4, accumulation=1)
    kept = {"losses": [1.0] * 4, "tokens": [1] * 4, "seconds": 1.0, "steps": 2, "machine": "another machine"}
    write(tmp_path / "cells", "nf4-1", qlora.said(setting), kept)
    given = (*SMALL, "--base", str(tiny_base), "--data", str(data), "--folder", str(tmp_path))
    done = run_benchmark("qlora", *given, "--cells", str(tmp_path / "cells"), "--trained", "bf16,nf4")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "qlora.json").read_text())
    assert measured["cells"]["nf4-1"] == kept
    assert [(one["arm"], len(one["by_seed"])) for one in measured["comparisons"]] == [("nf4", 2)]
    error = {arm: found["weight_error"] for arm, found in measured["summary"].items()}
    assert error["bf16"] < error["int8"] < error["nf4"] and error["nf4-loftq"] < error["nf4"] < error["fp4"]
    assert "| NF4 (QLoRA) | 2 |" in (tmp_path / "qlora.md").read_text()
    assert (tmp_path / "qlora.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_is_not_there_is_refused(
    tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qlora", "--base", str(tiny_base), "--data", str(data), "--only", "nf4-9"])
    with pytest.raises(SystemExit):
        qlora.parse()
    assert "there is no cell 'nf4-9'" in capsys.readouterr().err
