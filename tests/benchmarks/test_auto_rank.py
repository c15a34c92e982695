"""The rank benchmark keeps each cell, compares like with like, and says what it measured."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.auto_rank import comparison, report, settings_of, sizes, table
from benchmarks.auto_rank_cells import ADALORA, AUTO, DOCSTRINGS, FIXED, Cell, run_cell
from benchmarks.auto_rank_picture import draw
from benchmarks.cells import there, write


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
        write(options.cells, cell.name, settings_of(options), asdict(result) | {"machine": "a machine"})
    names = [f"{DOCSTRINGS}-{arm}-0" for arm in (FIXED, AUTO)]
    fixed, auto = there(options, names, settings_of(options)).values()
    assert len(fixed["losses"]) == len(auto["losses"]) == 8 and fixed["weights"] == auto["weights"]
    assert fixed["trainable"] * 0.97 < auto["trainable"] <= fixed["trainable"]
    assert len(set(fixed["ranks"].values())) == 1 < len(set(auto["ranks"].values()))
    assert auto["search_seconds"] > 0 == fixed["search_seconds"] and fixed["steps"] == auto["steps"] == 3
    report(options)
    assert (tmp_path / "out/auto_rank.png").read_bytes().startswith(b"\x89PNG")
    assert "scores" not in (tmp_path / "out/auto_rank.json").read_text()
    options.rows = 32
    assert there(options, names, settings_of(options)) == {}, "a cell of another setting is none of this one"


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


def test_an_arm_is_compared_on_the_seeds_that_both_have() -> None:
    found: Any = comparison(cells(AUTO, [0.1, 0.2, 0.3]), DOCSTRINGS, AUTO)
    assert found["by_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert comparison(cells(AUTO, [0.1]), DOCSTRINGS, AUTO) is None, "one seed says nothing of scatter"


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
