"""The real MiniLM encoder, out of a wheel, learns to find functions of the standard library by their docstrings."""

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from transformers import AutoModel

from flows.data.docstrings import pairs
from flows.params import Params
from flows.paths import Paths
from flows.project.presets import ENCODER, preset
from flows.stages import detect, evaluate, fetch, merge, prepare, train

HELD_OUT = {"asyncio", "email", "http", "json", "logging", "unittest", "xml"}


def write_rows(path: Path, learned: int, searched: int) -> None:
    """Write each sentence with its function's source, of other packages for training than for the search."""
    unique = list({pair.summary: pair for pair in pairs(Path(sysconfig.get_paths()["stdlib"]))}.values())
    random.Random(0).shuffle(unique)
    rows = [(pair.module.partition(".")[0], pair) for pair in unique]
    chosen = [row for row in rows if row[0] not in HELD_OUT][:learned]
    chosen += [row for row in rows if row[0] in HELD_OUT][:searched]
    lines = [json.dumps({"query": one.summary, "positive": one.source, "package": name}) for name, one in chosen]
    path.write_text("\n".join(lines) + "\n")


def params_of(task: Any, **changes: Any) -> Params:
    """Return the parameters of the task's preset, with some changed."""
    sections: dict[str, Any] = {}
    values = preset(task, "cpu") | {
        **{"base.source": ENCODER, "data.source": "rows.jsonl", "data.group_column": "package"},
        **{"data.max_length": 48, "data.validation_rows": 24, "data.test_rows": 160, "data.test_share": 0.25},
        **{"train.learning_rate": 1e-3, "train.evaluations": 1, "tracking.mode": "disabled"},
        **changes,
    }
    for key, value in values.items():
        *path, last = key.split(".")
        section = sections
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return Params.model_validate(sections)


@pytest.mark.proof
def test_an_adapter_finds_more_functions_than_its_base(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", learned=700, searched=220)
    params, paths = params_of("embeddings", **{"train.batch_size": 8, "train.max_steps": 24}), Paths(tmp_path)
    for stage in (fetch, detect, prepare, train, evaluate, merge):
        stage.run(params, paths)
    metrics = json.loads(paths.evaluation_metrics.read_text())
    for side in ("base", "adapter"):
        print(side, {name: round(value, 4) for name, value in metrics[side].items()})
    assert metrics["base"]["recall_at_1"] > 0.5  # a trained encoder, not a random one
    assert metrics["adapter"]["mrr_at_10"] > metrics["base"]["mrr_at_10"] + 0.01
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"] - 0.05
    assert parquet.read_table(paths.evaluation_rows).num_rows == 160
    assert json.loads(paths.merge_report.read_text())["cosine"] > 0.9999
    AutoModel.from_pretrained(paths.merged)
