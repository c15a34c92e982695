"""Which files are doubted, by how many rows they have and how far the champion's loss on them is off."""

from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from flows.params import Drift
from flows.retraining.drift import judged, spread_of

RULE = Drift(max_loss_gap=0.5, min_rows=8)
SPREAD = 0.8


def file(loss: float, rows: int, error: float = 0.1) -> dict[str, Any]:
    found = {"rows": rows, "loss": loss, "loss_weight": 10.0 * rows, "measured_rows": rows}
    return found | {"loss_error": float("nan") if rows == 1 else error}


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
@pytest.mark.parametrize("loss", [2.5, 9.0])
def test_nothing_is_judged_by_a_file_with_few_rows_whatever_its_loss(rows: int, loss: float) -> None:
    suspicious, unsure = judged({"few.jsonl": file(loss, rows)}, RULE, 2.5, SPREAD)
    assert list(unsure) == ["few.jsonl"]
    assert f"({rows} in all small files, 8 are needed)" in unsure["few.jsonl"]
    assert bool(suspicious) == (loss == 9.0), "one that is beyond chance is set aside if the candidate is refused"


def test_the_error_of_few_rows_is_that_of_rows_such_as_the_champion_knows() -> None:
    files = {"one.jsonl": file(3.4, 1), "many.jsonl": file(3.4, 8)}
    suspicious, _ = judged(files, RULE, 2.5, SPREAD)
    assert files["one.jsonl"]["loss_error"] == SPREAD
    assert files["many.jsonl"]["loss_error"] == 0.1
    assert list(suspicious) == ["many.jsonl"]


@pytest.mark.parametrize(("loss", "doubted"), [(2.6, []), (3.7, ["0.jsonl", "1.jsonl", "2.jsonl"])])
def test_small_files_are_judged_together(loss: float, doubted: list[str]) -> None:
    files = {f"{number}.jsonl": file(loss, 5) for number in range(3)}
    suspicious, unsure = judged(files, RULE, 2.5, SPREAD)
    assert (list(suspicious), unsure) == (doubted, {})
    assert all("the champion's loss is +1.20 nats above" in told for told in suspicious.values())


def test_without_a_limit_or_a_loss_nothing_is_doubted() -> None:
    assert judged({"few.jsonl": file(9.0, 1)}, Drift(max_loss_gap=None), 2.5, SPREAD) == ({}, {})
    assert judged({"few.jsonl": {"rows": 1, "divergence": 0.1}}, RULE, 2.5, SPREAD) == ({}, {})


def test_shuffled_rows_in_a_small_file_never_judge() -> None:
    """Their loss varies, and so did what was found of it by their own spread: 35 to 40 % of such files."""
    draw = numpy.random.default_rng(0)
    for rows in range(1, 8):
        for _ in range(20):
            losses = draw.normal(2.5 + 1.0, 1.2, rows)
            files = {"few.jsonl": file(float(losses.mean()), rows)}
            assert judged(files, RULE, 2.5, SPREAD)[1]


def test_the_spread_is_of_the_champions_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"adapter_loss": [1.0, 2.0, 3.0]}), path)
    assert spread_of(path) == 1.0


def test_a_champion_of_one_test_row_judges_no_small_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"adapter_loss": [2.5]}), path)
    spread = spread_of(path)
    assert spread is None
    files = {"few.jsonl": file(9.0, 1), "other.jsonl": file(9.0, 7), "many.jsonl": file(9.0, 8)}
    suspicious, unsure = judged(files, RULE, 2.5, spread)
    assert list(suspicious) == ["many.jsonl"] and list(unsure) == ["few.jsonl", "other.jsonl"]
    assert "the champion has one test row" in unsure["few.jsonl"]
    assert judged(files, Drift(max_loss_gap=None), 2.5, spread) == ({}, {})
