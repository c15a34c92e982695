"""Which losses cannot be right: those that are not finite, and spikes above what the last steps' losses were."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from peftcore.train.fault_policy import FaultPolicy

LEAST_DEVIATION = 0.1
"""Standard deviation (nats) that losses are taken to have at least: steps nearly alike say little of the next."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class LossWatch:
    """The losses of the last optimiser steps (nats), against which the next one is judged."""

    def __init__(self, policy: FaultPolicy) -> None:
        self.deviations = policy.spike_deviations
        self.losses: deque[float] = deque(maxlen=policy.spike_window)

    def fault(self, loss: float) -> str | None:
        """What is wrong with a step's loss, or None; a loss that is right is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._limit()
        if limit is not None and loss > limit:
            return f"the loss is {loss:.4g}, a spike above the {median(self.losses):.4g} of the last {len(self.losses)}"
        self.losses.append(loss)
        return None

    def remember(self, losses: Iterable[float]) -> None:
        """Forget what was seen, and take these losses for it."""
        self.losses = deque(losses, maxlen=self.losses.maxlen)

    def _limit(self) -> float | None:
        assert self.losses.maxlen is not None
        if self.deviations is None or len(self.losses) < self.losses.maxlen // 2:
            return None
        middle = median(self.losses)
        deviation = _NORMAL * median(abs(loss - middle) for loss in self.losses)
        return middle + self.deviations * max(deviation, LEAST_DEVIATION)
