"""Values of one metric for each row of an evaluation's table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow


def row_values(table: "pyarrow.Table", metric: str, side: str = "adapter") -> list[float | None] | None:
    """Return a metric's value for each row, None for rows without one; None if the table does not have the metric.

    The values of accuracy are 1 for a pair whose chosen answer is preferred, and for a text whose class is predicted;
    a table of unpaired preferences has the values as a column. Those of entity F1 follow from the rows' numbers of
    entities (`_entity_f1`).

    Args:
        table: The rows of an evaluation or a re-evaluation.
        metric: A figure or the name of a scorer.
        side: base or adapter.
    """
    column = f"{side}_{metric}"
    if metric == "entity_f1":
        return _entity_f1(table, side)
    if column not in table.column_names:
        return _accuracy(table, side) if metric == "accuracy" else None
    return [None if value is None else float(value) for value in table.column(column).to_pylist()]


def mean_value(table: "pyarrow.Table", metric: str, side: str = "adapter") -> float | None:
    """Return the mean of `row_values` over the rows that have a value; None if there is none."""
    values = [value for value in row_values(table, metric, side) or () if value is not None]
    return sum(values) / len(values) if values else None


def row_weights(table: "pyarrow.Table", metric: str) -> list[float]:
    """Return each row's weight in the mean of a metric: 1, or for the loss the row's weight in the test loss."""
    if metric != "loss":
        return [1.0] * table.num_rows
    return table.column("weight" if "weight" in table.column_names else "tokens").to_pylist()


def _accuracy(table: "pyarrow.Table", side: str) -> list[float | None] | None:
    if f"{side}_margin" in table.column_names:
        return [float(margin > 0) for margin in table.column(f"{side}_margin").to_pylist()]
    if f"{side}_prediction" not in table.column_names:
        return None
    pairs = zip(*(table.column(name).to_pylist() for name in ("label", f"{side}_prediction")), strict=True)
    return [float(label == prediction) for label, prediction in pairs]


def _entity_f1(table: "pyarrow.Table", side: str) -> list[float | None] | None:
    """Return values of the rows whose mean is the entity F1 of the whole table.

    F1 is a ratio of sums, F = Σ a_i / Σ b_i, with a_i = 2 correct and b_i = predicted + true entities of row i. A row's
    value is F + (a_i − F b_i) / b, b the mean of b_i: F and the row's influence on it. The mean of the values is F, and
    their scatter gives the standard error of F (infinitesimal jackknife; Efron, 1982, chapter 6). So a bootstrap of
    these values is to first order the bootstrap of F. Without any entity all values are 0.
    """
    names = (f"{side}_correct", f"{side}_entities", "entities")
    if not set(names) <= set(table.column_names):
        return None
    correct, predicted, true = (table.column(name).to_pylist() for name in names)
    above = [2.0 * count for count in correct]
    below = [float(sum(counts)) for counts in zip(predicted, true, strict=True)]
    if not sum(below):
        return [0.0] * table.num_rows
    f1, mean = sum(above) / sum(below), sum(below) / len(below)
    return [f1 + (a - f1 * b) / mean for a, b in zip(above, below, strict=True)]
