"""Protection of the weights from a bad loss or an overflow: stop, roll back, or skip the optimiser step.

Each event is logged as a warning and counted. A training record has `micro_batch_splits`, `skipped_steps` and
`rollbacks` since the last record, if there were any, and `loss_scale` if losses are scaled.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftcore.errors import TrainingError
from peftcore.train.fault_policy import FaultPolicy
from peftcore.train.loss_spikes import LossSpikeDetector
from peftcore.train.snapshot import Snapshot

_LOG = logging.getLogger(__name__)


class StepGuard:
    """Checks of the optimiser steps of one run."""

    def __init__(self, trainer: Any, policy: FaultPolicy) -> None:
        self.trainer = trainer
        self.policy = policy
        self.rollbacks = 0
        """Rollbacks of this run (count)."""
        self.snapshot: Snapshot | None = None
        """State that a rollback restores."""
        self.good_losses: list[float] = []
        """Losses of the optimiser steps that were kept, since the last training record."""
        self.counts: Counter[str] = Counter()
        """Events since the last training record."""
        self.detector = LossSpikeDetector(policy)
        self._losses_at_snapshot: list[float] = []
        self._step_loss: Tensor | None = None  # sum over the micro-batches of this step so far
        self.rolled_back = False
        """True if the present optimiser step was rolled back, and so has no gradients."""
        self._unrecorded_before: list[int] = []  # lengths of `_unrecorded` when this step began

    def state(self) -> dict[str, Any]:
        """Return the values (JSON types) with which a resumed run continues."""
        return {"losses": list(self.detector.losses), "rollbacks": self.rollbacks}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values that `state` returned."""
        self.detector.reset(state["losses"])
        self.rollbacks = state["rollbacks"]

    # -- losses ------------------------------------------------------------------------------------------------

    def start_micro_batch(self) -> None:
        """Let optimiser and schedule continue if the step before was rolled back."""
        if self.rolled_back:
            self._set_rolled_back(False)
        if self._step_loss is None:
            self._unrecorded_before = [len(values) for values in self._unrecorded()]

    def _unrecorded(self) -> tuple[list[Any], list[Any]]:
        """Return the lists of values since the last training record, to which each step appends."""
        return self.trainer.regularizer.values, self.trainer.training_objective.unrecorded()

    def check_loss(self, loss: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Return the loss of a micro-batch for Trainer's running sum; check the step's loss after its last micro-batch.

        Args:
            loss: The loss of the micro-batch, a scalar.
            num_items: Summed weight of the items of the optimiser step; None if unknown.

        Raises:
            TrainingError: The step's loss is bad, and the policy is to stop or no rollback is left.
        """
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        accelerator = self.trainer.accelerator
        if accelerator.sync_gradients:
            step_loss, self._step_loss = self._step_loss, None
            mean = cast(Tensor, accelerator.reduce(step_loss, "mean")).item()  # all processes take the same decision
            self._check_step_loss(mean)
            if num_items is not None and not torch.as_tensor(num_items).any():
                _LOG.warning(
                    "step %d: no row of its batches has a label and a weight above 0, so nothing is learned from them",
                    self.trainer.state.global_step + 1,
                )
        if self.policy.on_bad_loss == "stop":
            return loss
        # a value that is not finite would stay in Trainer's running sum
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _check_step_loss(self, loss: float) -> None:
        fault = self.detector.fault(loss)
        if fault is None:
            self.good_losses.append(loss)
            return
        trainer = self.trainer
        message = f"{fault} at step {trainer.state.global_step + 1} (learning rate {trainer._get_learning_rate():.2e})"
        advice = "lower the learning rate, clip gradients, look at the batch, or compute in float32"
        if self.policy.on_bad_loss == "stop":
            raise TrainingError(f"{message}; {advice}, or continue with on_bad_loss='rollback'")
        if self.rollbacks >= self.policy.max_rollbacks:
            raise TrainingError(f"{message}, after {self.rollbacks} rollbacks; {advice}")
        self._roll_back(message)

    # -- rollback ----------------------------------------------------------------------------------------------

    def take_snapshot(self) -> None:
        """Remember the present state as the one to roll back to, if the policy is to roll back."""
        if self.policy.on_bad_loss == "rollback":
            self.snapshot = Snapshot.of(self.trainer)
            self._losses_at_snapshot = list(self.detector.losses)

    def _roll_back(self, message: str) -> None:
        assert self.snapshot is not None  # taken when training began
        self.snapshot.restore(self.trainer)
        for values, length in zip(self._unrecorded(), self._unrecorded_before, strict=True):
            del values[length:]
        self.detector.reset(self._losses_at_snapshot)
        self.rollbacks += 1
        self.counts["rollbacks"] += 1
        # Trainer still calls optimizer.step(), which does nothing while gradients are not synchronised
        self.trainer.accelerator.gradient_state._set_sync_gradients(False)
        self._set_rolled_back(True)
        _LOG.warning(
            "%s: rolled back to the state after step %d; batches since then are not repeated (rollback %d of %d)",
            *(message, self.snapshot.step, self.rollbacks, self.policy.max_rollbacks),
        )

    def _set_rolled_back(self, rolled_back: bool) -> None:
        self.rolled_back = rolled_back
        for optimizer in self.trainer.accelerator._optimizers:
            optimizer._is_overflow = rolled_back  # Trainer advances the schedule only if this is False

    def step_was_taken(self) -> bool:
        """Return True if the optimiser has just changed the weights; warn of a step that overflowed in float16."""
        accelerator = self.trainer.accelerator
        if self.rolled_back or not accelerator.optimizer_step_was_skipped:
            return not self.rolled_back
        assert accelerator.scaler is not None  # only a gradient scaler skips steps
        self.counts["skipped_steps"] += 1
        _LOG.warning(
            "step %d: gradients overflowed in float16; the step is skipped and the loss scale is now %g",
            *(self.trainer.state.global_step + 1, accelerator.scaler.get_scale()),
        )
        return False

    # -- records -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, float]:
        """Return counts since the last training record, and forget them; the mean `loss` if steps were rolled back."""
        record: dict[str, float] = {}
        if self.counts["rollbacks"]:  # Trainer's mean includes the steps that were rolled back
            losses = self.good_losses
            record["loss"] = sum(losses) / len(losses) if losses else math.nan
        record.update(self.counts)
        if self.trainer.accelerator.scaler is not None:
            record["loss_scale"] = self.trainer.accelerator.scaler.get_scale()
        self.counts.clear()
        self.good_losses.clear()
        return record
