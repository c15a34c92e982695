"""The rank benchmark keeps each cell, compares like with like, and says what it measured."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.auto_rank import comparison, read, report, sizes, table, verdict, write
from benchmarks.auto_rank_cells import ADALORA, AUTO, DOCSTRINGS, FIXED, Cell, run_cell
from benchmarks.auto_rank_picture import draw


@pytest.fixture
def options(tmp_path: Path, tiny_base: Path, tokenizer: PreTrainedTokenizerBase) -> Namespace:
    """Of cells on a tiny base and a few rows."""
    made = []
    for number in range(32):
        asked, answered = (tokenizer(text)["input_ids"] for text in ("ask " * (1 + number % 5), f" answer {number}"))
        made.append({"input_ids": [*asked, *answered], "labels": [-100] * len(asked) + answered})
    for split in ("train", "test"):
        parquet.write_table(arrow.Table.from_pylist(made), tmp_path / f"{split}.parquet")
    folders = {"base": tiny_base, "data": tmp_path, "cells": tmp_path / "cells", "folder": tmp_path / "out"}
    return Namespace(**folders, rows=24, held_out=8, seeds=2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # transformers' own
def test_arms_have_equal_parameters_and_see_the_same_rows(options: Namespace, tmp_path: Path) -> None:
    for cell in (Cell(DOCSTRINGS, FIXED, 0), Cell(DOCSTRINGS, AUTO, 0)):
        result = run_cell(cell, *sizes(options, cell), options.base, options.data, tmp_path / "scratch")
        write(options, cell, asdict(result) | {"machine": "a machine"})
    fixed, auto = (read(options, Cell(DOCSTRINGS, arm, 0)) or {} for arm in (FIXED, AUTO))
    assert len(fixed["losses"]) == len(auto["losses"]) == 8 and fixed["weights"] == auto["weights"]
    assert fixed["trainable"] * 0.97 < auto["trainable"] <= fixed["trainable"]
    assert len(set(fixed["ranks"].values())) == 1 < len(set(auto["ranks"].values()))
    assert auto["search_seconds"] > 0 == fixed["search_seconds"] and fixed["steps"] == auto["steps"] == 3
    report(options)
    assert (tmp_path / "out/auto_rank.png").read_bytes().startswith(b"\x89PNG")
    assert "scores" not in (tmp_path / "out/auto_rank.json").read_text()
    options.rows = 32
    assert read(options, Cell(DOCSTRINGS, FIXED, 0)) is None, "a cell of another setting is none of this one"


def cell(arm: str, seed: int, losses: list[float]) -> tuple[str, dict[str, Any]]:
    ranks = {f"model.layers.{block}.q_proj": 4 + block + seed for block in range(3)}
    found = {
        "losses": losses,
        "weights": [1, 3],
        "right": None,
        "trainable": 100,
        "ranks": ranks,
        "machine": "a machine",
    }
    return f"{DOCSTRINGS}-{arm}-{seed}", found | {"search": None, "search_seconds": 0.0, "train_seconds": 2.0}


def cells(arm: str, differences: list[float]) -> dict[str, Any]:
    fixed = dict(cell(FIXED, seed, [2.0 + seed, 1.0]) for seed in range(len(differences)))
    return fixed | dict(cell(arm, s, [2.0 + s + d, 1.0 + d]) for s, d in enumerate(differences))


def test_differences_are_paired_by_seed_and_weighed_by_tokens() -> None:
    found: Any = comparison(cells(AUTO, [0.1, 0.2, 0.3]), DOCSTRINGS, AUTO)
    assert found["by_seed"] == pytest.approx([0.1, 0.2, 0.3]) and found["difference"] == pytest.approx(0.2)
    # Student's t of two degrees of freedom: 4.303 · 0.1 / √3
    assert found["over_seeds"] == pytest.approx([0.2 - 0.2484, 0.2 + 0.2484], abs=1e-4)
    assert found["over_rows"] == pytest.approx([0.2, 0.2])
    uneven = cells(AUTO, [0.0, 0.0])
    for name in (f"{DOCSTRINGS}-{AUTO}-0", f"{DOCSTRINGS}-{AUTO}-1"):
        uneven[name]["losses"][1] += 0.4  # of three tokens out of four
    assert comparison(uneven, DOCSTRINGS, AUTO)["difference"] == pytest.approx(0.3)  # type: ignore[index]
    assert comparison(cells(AUTO, [0.1]), DOCSTRINGS, AUTO) is None, "one seed says nothing of scatter"


def test_a_verdict_needs_both_intervals() -> None:
    assert verdict({"over_seeds": [-2, -1], "over_rows": [-3, -0.1]}) == "better"
    assert verdict({"over_seeds": [1, 2], "over_rows": [0.1, 3]}) == "worse"
    assert verdict({"over_seeds": [-2, 1], "over_rows": [-3, -0.1]}) == "not decided"


def test_the_table_and_the_picture_take_what_is_there(tmp_path: Path) -> None:
    there = cells(AUTO, [0.1, 0.1]) | cells(ADALORA, [-0.1, -0.2])
    measured = {
        "settings": {"rows": 24, "rank": 16, "learning_rates": {FIXED: 1e-3}},
        "cells": there,
        "comparisons": [comparison(there, DOCSTRINGS, arm) for arm in (AUTO, ADALORA)],
    }
    text = table(measured)
    assert "| docstrings, nats a token | auto | 2 | +0.1000 |" in text and "not decided" in text
    assert "4 to 7" in text and "Measured on a machine." in text
    draw(measured, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000
