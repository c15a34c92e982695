"""Rows of a prepared split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet as parquet

from flows.errors import StageError

Row = dict[str, Any]
"""{"input_ids", "labels"}: token ids of one row, and the other columns that `flows.stages.prepare` writes."""


def read_rows(path: Path, columns: list[str] | None = None, limit: int | None = None) -> list[Row]:
    """Return the first `limit` rows of a split (None: all), with these columns (None: all).

    Raises:
        StageError: The split has no rows, or the file is absent or damaged.
    """
    if not path.exists():
        raise StageError(f"there is no {path}; run `peftcore stage prepare` first")
    try:
        rows = cast(list[Row], parquet.read_table(path, columns=columns).slice(0, limit).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} is damaged ({error}); run `peftcore stage prepare` again") from error
    if not rows:
        raise StageError(f"{path} has no rows; give the prepare stage more data or a larger share for this split")
    return rows


def row_weights(rows: Sequence[Row]) -> list[float]:
    """Return the weight of each row in the mean loss; 1 for rows without one."""
    return [row.get("weight", 1.0) for row in rows]
