"""A registered candidate in a folder of its own, as the gate gets it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from flows.gate.candidate import Candidate
from peftcore.files import read_manifest, sha256


@pytest.fixture
def make(tmp_path: Path, results: Callable[..., None]) -> Callable[..., Candidate]:
    def make(version: str = "v0.2.0", **kwargs: Any) -> Candidate:
        folder = tmp_path / version
        results(folder, **kwargs)
        metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
        merge = json.loads((folder / "merge.json").read_text())
        files = [folder / "merge.json", *sorted((folder / "evaluation").glob("*.*"))]
        return Candidate(
            name="docstrings",
            version=version,
            adapter=folder / "adapter",
            files=read_manifest(folder / "adapter"),
            metrics=metrics,
            merge=merge,
            evidence={path: sha256(path) for path in files},
            record={
                **{name: metrics[name] for name in ("evaluation_set", "base_model")},
                "metrics": {part: metrics[part] for part in ("base", "adapter", "gain")}
                | {"merge": {name: merge[name] for name in ("kl", "top1_agreement")}},
            },
            control=parquet.read_table(folder / "evaluation" / "control.parquet"),
            rows=parquet.read_table(folder / "evaluation" / "rows.parquet"),
        )

    return make
