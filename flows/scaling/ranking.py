"""The table of a sweep's trials: best validation loss first, then pruned trials, failed trials last."""

import json
from collections.abc import Sequence
from pathlib import Path

from flows.paths import Paths
from flows.scaling.trial import Trial
from peftcore.files import write_atomically

COLUMNS = ("rank", "parameters", "validation loss", "step", "seconds", "error")


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, lowest validation loss first, then pruned trials, failed ones last; ties keep their order."""
    return sorted(trials, key=lambda trial: (trial.loss is None, trial.pruned is None, trial.loss or 0.0))


def rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Return the cells of each trial's row, in the order of COLUMNS. step: the optimiser step of the best loss."""
    return [
        (
            "" if trial.summary is None else str(place),
            " ".join(trial.overrides),
            "" if trial.summary is None else f"{trial.loss:.4f}",
            "" if trial.summary is None else str(trial.summary["best_step"]),
            f"{trial.seconds:.1f}",
            (trial.error or trial.pruned or "\n").splitlines()[0],
        )
        for place, trial in enumerate(trials, 1)
    ]


def write_ranking(paths: Paths, trials: Sequence[Trial]) -> Path:
    """Write reports/sweep.json, with the summary of each training, and reports/sweep.md; returns their folder."""
    folder = paths.review.parent
    folder.mkdir(exist_ok=True)
    records = [
        {
            "parameters": list(trial.overrides),
            "validation_loss": trial.loss,
            "seconds": round(trial.seconds, 3),
            "training": trial.summary,
            "error": trial.error,
            **({} if trial.pruned is None else {"pruned": trial.pruned}),
        }
        for trial in trials
    ]
    write_atomically(folder / "sweep.json", json.dumps(records, indent=2) + "\n")
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(trials)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    write_atomically(folder / "sweep.md", "".join(f"| {' | '.join(line)} |\n" for line in cells))
    return folder
