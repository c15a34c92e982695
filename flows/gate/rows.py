"""Values of one metric for each row of an evaluation's table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow


def row_values(table: "pyarrow.Table", metric: str, side: str = "adapter") -> list[float | None] | None:
    """Return a metric's value for each row, None for rows without one; None if the table does not have the metric.

    The values of accuracy are 1 for a pair whose chosen answer is preferred, and for a text whose class is predicted;
    a table of unpaired preferences has the values as a column.

    Args:
        table: The rows of an evaluation or a re-evaluation.
        metric: A figure or the name of a scorer.
        side: base or adapter.
    """
    column = f"{side}_{metric}"
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
