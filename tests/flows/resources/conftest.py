"""A project with prepared rows."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from flows.paths import Paths


@pytest.fixture
def paths(tmp_path: Path, tiny_base: Path) -> Paths:
    """A pipeline with a tiny base and 22 prepared rows of 8 to 29 tokens, the last third of each supervised."""
    made = Paths(tmp_path)
    made.data.mkdir(parents=True)
    lengths = range(8, 30)
    labels = [[-100] * (n - n // 3) + [5] * (n // 3) for n in lengths]
    table = pyarrow.table({"input_ids": [[5] * n for n in lengths], "labels": labels})
    parquet.write_table(table, made.split("train"))
    parquet.write_table(table.slice(0, 6), made.split("validation"))
    made.params.write_text(json.dumps({"method": {"r": 4}, "tracking": {"mode": "disabled"}}))
    return made
