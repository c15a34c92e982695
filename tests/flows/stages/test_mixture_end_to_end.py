"""Two sources in exact proportions through the stages: counts in the report, and an evaluation by source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from flows.params import Params
from flows.paths import Paths
from flows.stages import evaluate, prepare, train


@pytest.mark.slow
def test_sources_are_mixed_exactly_and_evaluated_one_by_one(
    tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]
) -> None:
    def rows(word: str, count: int) -> str:
        asked = [{"prompt": f"{word} {n} and 1?", "completion": f"{n + 1}."} for n in range(count)]
        return "".join(json.dumps(row) + "\n" for row in asked)

    paths = Paths(tmp_path)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "one.jsonl").write_text(rows("Add", 80))
    (tmp_path / "many" / "two.jsonl").write_text(rows("Sum", 40))
    (tmp_path / "few.jsonl").write_text(rows("Plus", 40))
    parts = [{"source": "many", "weight": 2}, {"source": "few.jsonl", "weight": 1}]
    data: dict[str, Any] = {"source": "mixture", "mixture": parts, "near_duplicates": "keep", "train_rows": 32}
    params = tiny_params(data=data | {"group_column": None, "slice_column": None})
    prepare.run(params, paths)
    report = json.loads(paths.data_report.read_text())["mixture"]
    assert [(part["source"], part["weight"], part["examples"]) for part in report.values()] == [
        ("many", 2, 120),
        ("few.jsonl", 1, 40),
    ]
    slices = [row["slice"] for row in parquet.read_table(paths.split("train"), columns=["slice"]).to_pylist()]
    assert {name: slices.count(name) for name in report} == {"many": 21, "few": 11}
    assert {name: part["train"] for name, part in report.items()} == {"many": 21, "few": 11}
    before = paths.split("train").read_bytes()
    prepare.run(params, paths)
    assert paths.split("train").read_bytes() == before
    train.run(params, paths)
    evaluate.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    assert metrics["slices"].keys() == {"many", "few"} and metrics["adapter"]["loss"] < metrics["base"]["loss"]
