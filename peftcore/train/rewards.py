"""Rewards of sampled answers: named functions of a row and an answer, and their weighted sum.

Shapes: E answers, K rewards.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError, TrainingError

RowReward = Callable[[Mapping[str, Any], str], float]
"""Function of (row, answer) that returns a number. row: the row of the data set; answer: the text of the answer."""


class Rewards:
    """Weighted sum of rewards.

    Args:
        functions: {name: function}, at least one.
        weights: {name: factor}; a reward without one has the factor 1.

    Raises:
        ConfigError: There is no reward, a weight belongs to none, or it is not finite.
    """

    def __init__(self, functions: Mapping[str, RowReward], weights: Mapping[str, float] | None = None) -> None:
        if not functions:
            raise ConfigError("no reward is given; give rewards={name: function of (row, answer) to a number}")
        self.functions = dict(functions)
        for name, weight in (weights or {}).items():
            if name not in functions:
                close = difflib.get_close_matches(name, functions, 1)
                known = f"did you mean {close[0]}?" if close else f"there are {', '.join(functions)}"
                raise ConfigError(f"a weight is given for the reward {name!r}, which does not exist; {known}")
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of the reward {name!r} must be finite; got {weight}")
        self.weights = torch.tensor([float((weights or {}).get(name, 1.0)) for name in functions], dtype=torch.float64)

    def values(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Tensor:
        """Return the value of each reward, (E, K) in float64.

        Raises:
            TrainingError: A reward raises, or returns something else than a finite number; names reward and row.
        """
        return torch.tensor(
            [
                [_value(name, function, row, answer) for name, function in self.functions.items()]
                for row, answer in zip(rows, answers, strict=True)
            ],
            dtype=torch.float64,
        )

    def total(self, values: Tensor) -> Tensor:
        """Return the weighted sums, (E,), of `values` (E, K)."""
        return values @ self.weights


def _value(name: str, function: RowReward, row: Mapping[str, Any], answer: str) -> float:
    try:
        value = function(row, answer)
    except Exception as error:  # of any code
        raise TrainingError(
            f"the reward {name} failed on row {row_name(row)} with the answer {answer!r:.80}: "
            f"{type(error).__name__}: {error}; mend it"
        ) from error
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TrainingError(
            f"the reward {name} returned {value!r:.80} on row {row_name(row)} with the answer {answer!r:.80}; it must "
            "return a finite number"
        )
    return number


def row_name(row: Mapping[str, Any]) -> str:
    """Return the id of a row for messages; without one its prompt, or the beginning of its tokens."""
    return str(row.get("id", row.get("prompt", row.get("input_ids"))))[:80]
