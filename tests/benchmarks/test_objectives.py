"""The benchmark of objectives on a tiny base: its rows, its stages, a merge that is refused, its table."""

import json
from pathlib import Path

import pytest

SMALL = {
    "data": {"train_rows": 64, "validation_rows": 4, "test_rows": 4, "max_length": 1024, "overlong": "drop"},
    "method": {"r": 2},
    "train": {"max_steps": 2, "batch_size": 2, "evaluations": 1},
    "evaluate": {"rows": 4, "generate_rows": 2, "max_new_tokens": 2, "samples": 1},
}
REFUSING = {"rows": 2, "max_kl": 0.0, "min_top1_agreement": 1.0}


@pytest.mark.proof
def test_objectives_are_trained_judged_and_merged(run_benchmark, tmp_path: Path, tiny_base: Path) -> None:
    given = ("--base", str(tiny_base), "--folder", str(tmp_path), "--cells", str(tmp_path / "cells"))

    def run(*arguments: str, **sections: dict) -> str:
        done = run_benchmark("objectives", *given, "--params", json.dumps(SMALL | sections), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--only", "orpo-0", merge=REFUSING)
    cell = json.loads((tmp_path / "cells" / "orpo-0.json").read_text())["cell"]
    assert cell["merge"] is None and "differs from the adapter" in cell["refused"]
    faithful = {"rows": 2, "max_kl": 9.0, "min_top1_agreement": 0.0}
    run("--only", "classification-0", merge=faithful)
    text = run("--draw", merge=faithful)
    cells = json.loads((tmp_path / "objectives.json").read_text())
    assert cells.keys() == {"classification-0"} and cells["classification-0"]["steps"] == 2
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:]] == [["| classification, rate 5e-4", "1", "2"]]
    assert "orpo-0" in run("--missing", merge=faithful).split()
