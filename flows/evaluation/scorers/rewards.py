"""Rewards of `train.grpo.rewards`: scorers of the evaluation with their weighted sum, and functions for training.

Training and evaluation call the same functions with the same columns of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.evaluation.scorers.load import load_scorer
from flows.evaluation.scorers.scores import finite_number, shown_row
from flows.evaluation.scorers.texts import Score
from flows.params import Reward, RewardSum, Scorer


def load_scorers(scorers: Sequence[Scorer], root: Path) -> dict[str, tuple[Scorer, Score]]:
    """Return {name: entry and function} of scorers, rewards and their sum.

    Args:
        scorers: The entries; a reward is computed once for its column and for the sum.
        root: The repository.

    Raises:
        StageError: A function is missing, its module cannot be imported, or it does not take the options.
    """
    rewards: dict[str, Score] = {}

    def function(scorer: Scorer) -> Score:
        if isinstance(scorer, RewardSum):
            return _weighted_sum([(function(reward), reward.weight) for reward in scorer.rewards])
        if not isinstance(scorer, Reward):
            return load_scorer(scorer, root)
        if scorer.name not in rewards:
            rewards[scorer.name] = _remembered(with_default(scorer, load_scorer(scorer, root)))
        return rewards[scorer.name]

    return {scorer.name: (scorer, function(scorer)) for scorer in scorers}


def training_rewards(rewards: Sequence[Reward], root: Path) -> dict[str, Callable[[Mapping[str, Any], str], float]]:
    """Return {name: function of (prepared row, answer)} for training. The arguments are those of `load_scorers`."""

    def for_training(score: Score) -> Callable[[Mapping[str, Any], str], float]:
        return lambda row, answer: score(row["prompt"], answer, row["completion"], shown_row(row))

    return {reward.name: for_training(with_default(reward, load_scorer(reward, root))) for reward in rewards}


def with_default(reward: Reward, score: Score) -> Score:
    """Return the function of a reward; if `on_error` is a number, a failing answer gets that number."""
    default = reward.on_error
    if not isinstance(default, float):
        return score

    def scored(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        try:
            return finite_number(score(prompt, answer, reference, row))
        except Exception:  # of any code; the policy of the entry
            return default

    return scored


def _weighted_sum(parts: Sequence[tuple[Score, float]]) -> Score:
    def total(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        return sum(weight * finite_number(score(prompt, answer, reference, row)) for score, weight in parts)

    return total


def _remembered(score: Score) -> Score:
    """Return the function with a memory for values of the same answer to the same row."""
    values: dict[tuple[Any, str], float] = {}

    def scored(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        key = row["id"], answer
        if key not in values:
            values[key] = score(prompt, answer, reference, row)
        return values[key]

    return scored
