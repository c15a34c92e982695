"""The epoch benchmark trains both sides alike, checks that it does, and says what it measured."""

import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.epoch import check, order_rows, summary, table
from benchmarks.epoch_picture import running_mean
from benchmarks.epoch_side import Result

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; pip install -e .[dev]")
ROWS = 12


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Prepared rows of unequal length; the end of the turn is supervised."""
    made = []
    for number in range(ROWS):
        prompt, completion = "ask " * (1 + number % 5) + str(number), f" answer {number}"
        asked = tokenizer(prompt)["input_ids"]
        answered = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        ids, labels = [*asked, *answered], [-100] * len(asked) + answered
        made.append({"prompt": prompt, "completion": completion, "input_ids": ids, "labels": labels})
    return made


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The arguments that name a tiny base, the prepared rows and where results go."""
    data = tmp_path / "prepared"
    data.mkdir()
    for split in ("train", "validation"):
        parquet.write_table(arrow.Table.from_pylist(rows), data / f"{split}.parquet")
    return ("--base", str(tiny_base), "--data", str(data), "--folder", str(tmp_path / "out"))


def result(**changes: Any) -> Result:
    base: dict[str, Any] = {
        "side": "ours",
        "seconds": 2.0,
        "cpu_seconds": 2.0,
        "steps": 4,
        "curve_seconds": [0.5, 1.0, 1.5, 2.0],
        "curve_losses": [4.0, 3.0, 2.0, 1.0],
        "held_out_loss": 1.5,
        "peak_rss": 2**30,
        "tokens": 100,
        "padded_tokens": 120,
        "trainable": 10,
        "start_norm": 1.0,
        "batches": ["a", "b"],
    }
    return Result(**{**base, **changes})


@pytest.mark.proof
def test_our_side_alone_needs_no_trl(
    run_benchmark, prepared: tuple[str, ...], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    done = run_benchmark("epoch", *prepared, "--sides", "ours", "--batch", "2", "--accumulation", "2")
    assert done.returncode == 0, done.stderr
    (side,) = json.loads((tmp_path / "out/epoch.json").read_text())["same"]["sides"]
    assert side["steps"] == len(side["curve"]["losses"]) == 3
    assert side["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert side["padded_tokens"] >= side["tokens"]
    assert "attention, autocast off, gradient checkpointing off" in (tmp_path / "out/epoch.md").read_text()
    assert (tmp_path / "out/epoch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.proof
@needs_trl
def test_both_sides_see_the_same_batches_and_lose_the_same(
    run_benchmark, prepared: tuple[str, ...], tmp_path: Path
) -> None:
    given = ("--batch", "2", "--accumulation", "2", "--dropout", "0", "--autocast", "off")
    done = run_benchmark("epoch", *prepared, *given)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "out/epoch.json").read_text())["same"]["sides"]
    assert ours["curve"]["losses"] == pytest.approx(theirs["curve"]["losses"], rel=1e-2)
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-2)


@pytest.mark.proof
@needs_trl
def test_by_default_trl_prepares_the_text_itself_to_the_same_labels(
    run_benchmark, prepared: tuple[str, ...], tmp_path: Path
) -> None:
    done = run_benchmark("epoch", *prepared, "--mode", "default", "--batch", "4", "--sides", "ours/TRL")
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "out/epoch.json").read_text())["default"]["sides"]
    assert ours["tokens"] == theirs["tokens"]
    assert "gradient checkpointing on" in (tmp_path / "out/epoch.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_norm": 1.1}, "started from other weights"),
        ({"batches": ["b", "a"]}, "saw other batches"),
        ({"tokens": 99, "batches": ["a", "b"]}, "saw 99 tokens"),
    ],
)
def test_unequal_runs_are_no_comparison(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check([result(), result(side="TRL", **changes)], same=True)


def test_the_last_quarter_and_the_ratio_of_medians() -> None:
    ours = summary([result(seconds=1.0), result(seconds=2.0), result(seconds=9.0)])
    theirs = summary([result(side="TRL", seconds=8.0, curve_losses=[4.0, 3.0, 2.0, 1.02])])
    assert (ours["seconds"], ours["training_loss"]) == (2.0, 1.0)
    side = {
        "side": "ours",
        "same": True,
        "batch": 8,
        "accumulation": 2,
        "learning_rate": 5e-4,
        "attention": "sdpa",
        "autocast": False,
        "checkpointing": False,
    }
    settings = {"rows": 64, "order": "grouped", "dropout": 0.05, "repeats": 3, "sides": [side, {**side, "side": "TRL"}]}
    text = table("same", {"settings": settings, "sides": [ours, theirs], "machine": "a machine"})
    assert "ours to TRL's: 0.25 (target ≤ 0.45: met); CPU time 1.00." in text
    assert "Training loss: -1.96% (within 1%: no). Held-out loss: +0.00% (within 1%: yes)." in text


def test_grouped_order_keeps_every_row(prepared: tuple[str, ...], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    options = Namespace(data=tmp_path / "prepared", rows=None, mode="same", order="grouped", batch=2)
    longest = order_rows(options, tmp_path / "ordered.parquet")
    ordered = [tuple(ids) for ids in parquet.read_table(tmp_path / "ordered.parquet")["input_ids"].to_pylist()]
    assert sorted(ordered) == sorted(tuple(row["input_ids"]) for row in rows)
    assert longest == max(len(ids) for ids in ordered)


def test_running_mean() -> None:
    assert running_mean([2.0, 4.0, 6.0], 2) == [2.0, 3.0, 5.0]
