"""Metrics and rows that every objective has: gains, slices, and the weight of a row."""

import pytest

from flows.data.rows import Row
from flows.evaluation.result import COMMON, common_columns, common_metrics
from flows.evaluation.scoring import RowLosses

ROWS: list[Row] = [{"id": "a", "slice": "sql"}, {"id": "b", "slice": "chat"}, {"id": "c", "slice": "sql"}]
LOSSES = {"base": RowLosses([3.0, 2.0, 1.0], [1, 5, 3]), "adapter": RowLosses([2.0, 2.5, 1.0], [1, 5, 3])}


def test_a_gain_is_a_decrease_of_the_loss_and_a_rise_of_the_others() -> None:
    base, adapter = {"loss": 2.0, "rouge_l": 0.25, "ended": 0.5}, {"loss": 1.5, "rouge_l": 0.75, "ended": 1.0}
    metrics = common_metrics(ROWS, LOSSES, base, adapter, ["rouge_l"])
    assert metrics["gain"] == {"loss": 0.5, "rouge_l": 0.5}
    assert (metrics["base"], metrics["adapter"], metrics["rows"]) == (base, adapter, 3)


def test_a_slices_loss_is_of_its_rows_by_their_tokens() -> None:
    slices = common_metrics(ROWS, LOSSES, {"loss": 0.0}, {"loss": 0.0}, [])["slices"]
    assert list(slices) == ["chat", "sql"]
    assert slices["chat"] == {"rows": 1, "base_loss": 2.0, "adapter_loss": 2.5}
    assert slices["sql"]["rows"] == 2
    assert slices["sql"]["base_loss"] == pytest.approx((3.0 * 1 + 1.0 * 3) / 4)
    assert slices["sql"]["adapter_loss"] == pytest.approx((2.0 * 1 + 1.0 * 3) / 4)


def test_rows_have_the_common_columns_in_the_order_of_the_rows() -> None:
    weighed = RowLosses([3.0, 2.0, 1.0], [1, 5, 3], [0.5, 5.0, 6.0])
    columns = common_columns(ROWS, weighed, LOSSES["adapter"])
    assert all(list(row) == [name for name, _ in COMMON] for row in columns)
    assert [(row["id"], row["tokens"], row["weight"]) for row in columns] == [
        ("a", 1, 0.5),
        ("b", 5, 5.0),
        ("c", 3, 6.0),
    ]
    assert [(row["base_loss"], row["adapter_loss"]) for row in columns] == [(3.0, 2.0), (2.0, 2.5), (1.0, 1.0)]
