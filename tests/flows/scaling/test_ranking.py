"""The table of a sweep's trials."""

import json
from pathlib import Path

from flows.paths import Paths
from flows.scaling.ranking import ranked, rows, write_ranking
from flows.scaling.trial import Trial


def test_the_best_comes_first_and_what_failed_last(tmp_path: Path) -> None:
    good = {"best_validation_loss": 2.5, "best_step": 4}
    bad = Trial(("a=1",), 1.0, error="the loss is nan | stopped\nmore")
    trials = ranked([bad, Trial(("a=2",), 2.0, good | {"best_validation_loss": 3.0}), Trial(("a=3",), 3.0, good)])
    assert [row[1:4] for row in rows(trials)] == [
        ("a=3", "2.5000", "4"),
        ("a=2", "3.0000", "4"),
        ("a=1", "", ""),
    ]
    folder = write_ranking(Paths(tmp_path), trials)
    assert [record["validation_loss"] for record in json.loads((folder / "sweep.json").read_text())] == [2.5, 3.0, None]
    assert (folder / "sweep.md").read_text().splitlines()[-1] == (
        r"|  | a=1 |  |  | 1.0 | the loss is nan \| stopped |"
    )


def test_a_pruned_trial_comes_between_the_complete_and_the_failed_ones(tmp_path: Path) -> None:
    good = Trial(("a=1",), 1.0, {"best_validation_loss": 2.5, "best_step": 4})
    pruned, failed = Trial(("a=2",), 1.0, pruned="pruned at evaluation 2"), Trial(("a=3",), 1.0, error="no memory")
    trials = ranked([failed, pruned, good])
    assert trials == [good, pruned, failed]
    assert [row[-1] for row in rows(trials)] == ["", "pruned at evaluation 2", "no memory"]
    records = json.loads((write_ranking(Paths(tmp_path), trials) / "sweep.json").read_text())
    assert [record.get("pruned") for record in records] == [None, "pruned at evaluation 2", None]
