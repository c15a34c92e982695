"""A repository after its first stages, on a tiny base: enough for training, evaluation and merging to be real."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.params import Params
from flows.paths import Paths
from flows.stages import prepare


@pytest.fixture
def tiny_params() -> Callable[..., Params]:
    """`tiny_params(train={...}, method={...})`: parameters for a run of eight steps, with these sections changed."""

    def make(**sections: dict[str, Any]) -> Params:
        given: dict[str, dict[str, Any]] = {
            "data": {
                "source": "rows.jsonl",
                "group_column": "book",
                "slice_column": "book",
                "train_rows": 32,
                "validation_rows": 8,
                "test_rows": 12,
                "validation_share": 0.15,
                "test_share": 0.15,
            },
            "method": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "train": {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 0.01, "evaluations": 4},
            "evaluate": {"rows": 12, "batch_size": 4, "generate_rows": 6, "max_new_tokens": 8, "samples": 3},
            "merge": {"rows": 6},
            "tracking": {"mode": "disabled"},
        }
        for name, section in sections.items():
            given[name] = given.get(name, {}) | section
        return Params.model_validate(given)

    return make


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, tiny_params: Callable[..., Params]) -> Paths:
    """Paths below `tmp_path` with the base fetched and sums with their answers prepared."""
    rows = [
        {"prompt": f"How much is {number} and 1?", "completion": f"{number + 1}.", "book": f"book{number // 4}"}
        for number in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = Paths(tmp_path)
    prepare.run(tiny_params(), paths)
    return paths


@pytest.fixture
def trained(prepared: Paths, tiny_params: Callable[..., Params]) -> Paths:
    """`prepared`, and an adapter trained on it."""
    from flows.stages import train

    train.run(tiny_params(), prepared)
    return prepared
