"""What training does when a batch does not fit into memory, or when its loss cannot be right."""

from dataclasses import dataclass
from typing import Literal, get_args

from peftcore.errors import ConfigError

OnOutOfMemory = Literal["split", "stop"]
OnBadLoss = Literal["stop", "rollback"]


@dataclass(frozen=True)
class FaultPolicy:
    """`AdapterTrainer(..., faults=FaultPolicy(on_bad_loss="rollback"))`; ConfigError for values that cannot be.

    A loss is bad if it is not finite, or if it is a spike: above the median of the last `spike_window` steps' losses by
    more than `spike_deviations` of their standard deviation, which is taken from their median absolute deviation (so
    that earlier spikes do not widen it) and is never below `peftcore.train.bad_loss.LEAST_DEVIATION`.
    """

    on_out_of_memory: OnOutOfMemory = "split"
    """split: halve the micro-batch and accumulate its parts, one row at least. stop: raise TrainingError."""
    on_bad_loss: OnBadLoss = "stop"
    """stop: raise TrainingError before the loss reaches the weights. rollback: go back to the last checkpoint's state
    and on with the next batches; those since the checkpoint are not seen again."""
    spike_deviations: float | None = 10.0
    """Standard deviations above the median that make a spike; None: only a loss that is not finite is bad."""
    spike_window: int = 50
    """Optimiser steps that a loss is compared with (count); once half of them are there, losses are judged."""
    max_rollbacks: int = 3
    """Rollbacks of one run (count); the next bad loss stops it."""

    def __post_init__(self) -> None:
        for name, kinds in (("on_out_of_memory", OnOutOfMemory), ("on_bad_loss", OnBadLoss)):
            if getattr(self, name) not in get_args(kinds):
                fitting = " or ".join(get_args(kinds))
                raise ConfigError(f"FaultPolicy: {name} must be {fitting}; got {getattr(self, name)!r}")
        if self.spike_deviations is not None and not self.spike_deviations > 0:
            raise ConfigError(f"FaultPolicy: spike_deviations must be positive or None; got {self.spike_deviations}")
        if self.spike_window < 4:
            raise ConfigError(f"FaultPolicy: spike_window must be at least 4 steps; got {self.spike_window}")
        if self.max_rollbacks < 1:
            raise ConfigError(f"FaultPolicy: max_rollbacks must be at least 1; got {self.max_rollbacks}")
