from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flows.data.rows import read_rows
from flows.errors import StageError


def write(path: Path, count: int) -> Path:
    table = pa.table({"input_ids": [[i] for i in range(count)], "id": [str(i) for i in range(count)]})
    parquet.write_table(table.cast(pa.schema([("input_ids", pa.list_(pa.int32())), ("id", pa.string())])), path)
    return path


def test_rows_come_in_order_with_the_columns_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "test.parquet", 4)
    assert read_rows(path, ["input_ids"], limit=2) == [{"input_ids": [0]}, {"input_ids": [1]}]
    assert [row["id"] for row in read_rows(path)] == ["0", "1", "2", "3"]


def test_no_file_or_no_rows_says_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run `peftcore stage prepare`"):
        read_rows(tmp_path / "test.parquet")
    with pytest.raises(StageError, match="has no rows"):
        read_rows(write(tmp_path / "test.parquet", 0))
