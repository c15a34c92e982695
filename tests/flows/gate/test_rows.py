"""Values of a metric for each row of an evaluation's table."""

import numpy
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


def counts(correct: list[int], predicted: list[int], true: list[int]) -> pa.Table:
    names = {"adapter_correct": correct, "adapter_entities": predicted, "entities": true}
    return pa.table(names | {"id": [str(i) for i in range(len(true))]})


def test_entity_f1_is_that_of_all_rows_together_and_not_the_mean_of_the_rows() -> None:
    table = counts([1, 0, 4], [1, 3, 5], [2, 0, 5])
    assert mean_value(table, "entity_f1") == pytest.approx(2 * 5 / (9 + 7))
    assert row_values(table, "entity_f1", "base") is None
    assert row_values(counts([0, 0], [0, 0], [0, 0]), "entity_f1") == [0.0, 0.0]


def test_the_scatter_of_entity_f1_is_that_of_its_bootstrap() -> None:
    """The standard error from the rows' values is that of F1 over resampled rows, to first order."""
    draw = numpy.random.default_rng(0)
    true = draw.integers(0, 6, 400)
    correct = draw.binomial(true, 0.7)
    predicted = correct + draw.integers(0, 3, 400)
    values = row_values(counts(correct.tolist(), predicted.tolist(), true.tolist()), "entity_f1")
    assert values is not None
    drawn = draw.integers(400, size=(4000, 400))
    resampled = 2 * correct[drawn].sum(1) / (predicted[drawn].sum(1) + true[drawn].sum(1))
    assert numpy.std(values) / 400**0.5 == pytest.approx(resampled.std(), rel=0.05)
