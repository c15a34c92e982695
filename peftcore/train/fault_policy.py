"""Options for faults in training: a batch that does not fit into memory, and a bad loss."""

from dataclasses import dataclass
from typing import Literal, get_args

from peftcore.errors import ConfigError

OnOutOfMemory = Literal["split", "stop"]
OnBadLoss = Literal["stop", "rollback"]


@dataclass(frozen=True)
class FaultPolicy:
    """Actions of a trainer on out-of-memory errors and bad losses.

    A loss is bad if it is not finite, or if it is a spike: more than `spike_deviations` standard deviations above the
    median of the last `spike_window` steps' losses. The standard deviation is estimated from the median absolute
    deviation, so that earlier spikes do not widen it, and is at least `peftcore.train.loss_spikes.LEAST_DEVIATION`.

    Example:
        `AdapterTrainer(..., faults=FaultPolicy(on_bad_loss="rollback"))`

    Raises:
        ConfigError: A value is out of range.
    """

    on_out_of_memory: OnOutOfMemory = "split"
    """split: halve the rows per forward pass, down to one row, and accumulate. stop: raise TrainingError."""
    on_bad_loss: OnBadLoss = "stop"
    """stop: raise TrainingError before the loss changes the weights. rollback: restore the state of the last checkpoint
    and continue with the next batches; the batches since that checkpoint are not repeated."""
    spike_deviations: float | None = 10.0
    """Standard deviations above the median that make a spike. None: only a loss that is not finite is bad."""
    spike_window: int = 50
    """Optimiser steps that a loss is compared with (count). Spikes are detected once half of the window is filled."""
    max_rollbacks: int = 3
    """Rollbacks of one run (count); the next bad loss stops the run."""

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
