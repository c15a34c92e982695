"""Checks of the rewards of `train.grpo` before training: `peftcore doctor` runs them on answers that need no model.

A reward that fails, or that gives every answer the same number, teaches nothing. One that likes an empty answer as much
as the reference teaches the model to say nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.data.rows import Row
from flows.evaluation.scorers.rewards import training_rewards
from flows.evaluation.scorers.scores import finite_number
from flows.params import Reward
from flows.validation.findings import Finding, make_finding

ROWS = 64
"""Maximum number of rows on which rewards are tried."""
SHOWN = 120
"""Maximum number of characters of a failure's message."""


def reward_findings(rewards: Sequence[Reward], rows: Sequence[Row], root: Path) -> list[Finding]:
    """Return a finding for each reward, and one for their weighted sum.

    Each function scores the reference, the prompt and an empty text as answers to evenly spread rows.

    Args:
        rewards: The entries of `train.grpo.rewards`.
        rows: Prepared training rows with `prompt` and `completion`.
        root: The repository, with the files of the functions.

    Raises:
        StageError: A function is missing, its module cannot be imported, or it does not take the options.
    """
    step = max(1, math.ceil(len(rows) / ROWS))
    tried = rows[::step]
    scores = {name: _scores(function, tried) for name, function in training_rewards(rewards, root).items()}
    findings = [_reward_finding(name, *of) for name, of in scores.items()]
    if any(failures for _, failures in scores.values()):
        return findings  # the sum would be wrong
    sums = {
        kind: [
            sum(reward.weight * scores[reward.name][0][kind][number] for reward in rewards)
            for number in range(len(tried))
        ]
        for kind in ("reference", "empty")
    }
    reference, empty = _mean(sums["reference"]), _mean(sums["empty"])
    findings.append(
        make_finding(
            "sum of rewards",
            f"references get {reference:.3g}, empty answers {empty:.3g}",
            reference - empty,
            warning=empty >= reference,
            fix="the model can learn to say nothing: add a reward that an empty answer does not get",
        )
    )
    return findings


def _scores(
    function: Callable[[Mapping[str, Any], str], float], rows: Sequence[Row]
) -> tuple[dict[str, list[float]], list[str]]:
    """Return the scores of each kind of answer, and the failures on references."""
    scores: dict[str, list[float]] = {"reference": [], "prompt": [], "empty": []}
    failures: list[str] = []
    for row in rows:
        for kind, answer in (("reference", row["completion"]), ("prompt", row["prompt"]), ("empty", "")):
            try:
                scores[kind].append(finite_number(function(row, answer)))
            except Exception as error:  # of the user's code; the finding tells it
                failures.append(f"row {row['id']}, answer {answer!r:.40}: {type(error).__name__}: {error}"[:SHOWN])
    return scores, failures


def _reward_finding(name: str, scores: dict[str, list[float]], failures: list[str]) -> Finding:
    check = f"reward {name}"
    if failures:
        figure = f"it failed on {len(failures)} answers, first on {failures[0]}"
        fix = "mend the function, or give on_error: the number that such an answer gets"
        return make_finding(check, figure, len(failures), error=True, fix=fix)
    every = [value for values in scores.values() for value in values]
    low, high = min(every), max(every)
    return make_finding(
        check,
        f"{low:.3g} to {high:.3g}, mean of the references {_mean(scores['reference']):.3g}",
        high - low,
        warning=low == high,
        fix="references, prompts and empty answers get the same number, from which nothing is learned",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
