"""Detection of bad losses: those that are not finite, and spikes above the losses of the last steps."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from peftcore.train.fault_policy import FaultPolicy

LEAST_DEVIATION = 0.1
"""Lower bound (nats) of the standard deviation, so that nearly equal losses do not make every later loss a spike."""
_NORMAL = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation."""


class LossSpikeDetector:
    """Losses of the last optimiser steps (nats), with which the next loss is compared.

    Args:
        policy: Window and threshold of a spike.
    """

    def __init__(self, policy: FaultPolicy) -> None:
        self.deviations = policy.spike_deviations
        self.losses: deque[float] = deque(maxlen=policy.spike_window)

    def fault(self, loss: float) -> str | None:
        """Return the reason why a step's loss is bad, or None after adding a good loss to the window."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._limit()
        if limit is not None and loss > limit:
            return f"the loss is {loss:.4g}, a spike above the {median(self.losses):.4g} of the last {len(self.losses)}"
        self.losses.append(loss)
        return None

    def reset(self, losses: Iterable[float]) -> None:
        """Replace the window by these losses."""
        self.losses = deque(losses, maxlen=self.losses.maxlen)

    def _limit(self) -> float | None:
        assert self.losses.maxlen is not None
        if self.deviations is None or len(self.losses) < self.losses.maxlen // 2:
            return None
        middle = median(self.losses)
        deviation = _NORMAL * median(abs(loss - middle) for loss in self.losses)
        return middle + self.deviations * max(deviation, LEAST_DEVIATION)
