"""Values of a metric for each row of an evaluation's table."""

import pyarrow as pa
import pytest

from flows.gate.rows import mean_value, row_values, row_weights


def test_a_metrics_column_and_its_mean_without_missing_values() -> None:
    table = pa.table({"adapter_rougeL": [0.5, None, 1.0], "base_rougeL": [0.0, 0.5, 0.25]})
    assert row_values(table, "rougeL") == [0.5, None, 1.0]
    assert mean_value(table, "rougeL") == 0.75
    assert mean_value(table, "rougeL", "base") == 0.25
    assert row_values(table, "chrf") is None
    assert mean_value(table, "chrf") is None


def test_accuracy_of_pairs_and_of_classes() -> None:
    pairs = pa.table({"adapter_margin": [1.5, -0.5, 0.0], "base_margin": [1.0, 1.0, 1.0]})
    assert row_values(pairs, "accuracy") == [1, 0, 0]
    assert mean_value(pairs, "accuracy", "base") == 1
    classes = pa.table({"label": ["a", "b"], "adapter_prediction": ["a", "a"]})
    assert row_values(classes, "accuracy") == [1, 0]
    assert row_values(classes, "accuracy", "base") is None


@pytest.mark.parametrize(
    ("columns", "weights"),
    [({"tokens": [3, 5]}, [3, 5]), ({"tokens": [3, 5], "weight": [0.5, 2.0]}, [0.5, 2.0])],
)
def test_rows_count_by_their_weight_or_tokens_for_the_loss_alone(
    columns: dict[str, list[float]], weights: list[float]
) -> None:
    table = pa.table(columns)
    assert row_weights(table, "loss") == weights
    assert row_weights(table, "accuracy") == [1, 1]
