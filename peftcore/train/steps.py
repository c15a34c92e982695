"""One optimiser step that survives what goes wrong in it: too large a batch, an overflow, a loss that cannot be right.

Each is dealt with where Trainer's loop would otherwise carry it into the weights, and is warned of and counted: a
training record has `micro_batch_splits`, `skipped_steps` and `rollbacks` since the one before, where there were any,
and `loss_scale` where losses are scaled.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.train.bad_loss import LossWatch
from peftcore.train.fault_policy import FaultPolicy
from peftcore.train.objective import ObjectiveMixin, adapted_model
from peftcore.train.out_of_memory import gradients_apart, is_out_of_memory, parts_of, rows_of
from peftcore.train.precision import unscale_gradients
from peftcore.train.snapshot import Snapshot

_LOG = logging.getLogger(__name__)


class StepMixin(ObjectiveMixin):
    """What AdapterTrainerMixin does in a step beyond computing its loss."""

    def start_watching(self, policy: FaultPolicy) -> None:
        """Begin a run: nothing has gone wrong in it yet."""
        self.faults = policy
        self.rows_at_once: int | None = None
        """Rows that have been found to fit into memory together; None: nothing has been too large."""
        self.rollbacks = 0
        self.snapshot: Snapshot | None = None
        self._watch = LossWatch(policy)
        self._seen: list[float] = []  # what the watch held at the snapshot
        self._step_loss: Tensor | None = None  # of the micro-batches of this step so far
        self._left_out = False
        self._good_losses: list[float] = []  # since the last record
        self._counts: Counter[str] = Counter()  # since the last record

    def fault_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that a resumed run goes on as this one does; of JSON's types."""
        return {"losses": list(self._watch.losses), "rows_at_once": self.rows_at_once, "rollbacks": self.rollbacks}

    def load_fault_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `fault_state` gave."""
        self._watch.remember(state["losses"])
        self.rows_at_once, self.rollbacks = state["rows_at_once"], state["rollbacks"]

    # -- the step ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's, in parts if the batch does not fit; a bad loss is kept from the weights.

        Raises TrainingError for a batch that does not fit and cannot be split further, and for a bad loss where the
        policy is to stop.
        """
        if self._left_out:
            self._left_out_is(False)
        loss = self._forward_backward(model, inputs, num_items_in_batch)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            whole, self._step_loss = self._step_loss, None
            self._judge(cast(Tensor, self.accelerator.reduce(whole, "mean")).item())  # so that all decide alike
        # what is not finite would stay in Trainer's running sum for good
        return loss if self.faults.on_bad_loss == "stop" else torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _judge(self, loss: float) -> None:
        fault = self._watch.fault(loss)
        if fault is None:
            self._good_losses.append(loss)
            return
        said = f"{fault} at step {self.state.global_step + 1} (learning rate {self._get_learning_rate():.2e})"
        advice = "lower the learning rate, clip gradients, look at the batch, or compute in float32"
        if self.faults.on_bad_loss == "stop":
            raise TrainingError(f"{said}; {advice}, or go on with on_bad_loss='rollback'")
        if self.rollbacks >= self.faults.max_rollbacks:
            raise TrainingError(f"{said}, after {self.rollbacks} rollbacks; {advice}")
        self._roll_back(said)

    def _roll_back(self, said: str) -> None:
        assert self.snapshot is not None  # taken when training began
        self.snapshot.restore(self, adapted_model(self))
        self._watch.remember(self._seen)
        self.rollbacks += 1
        self._counts["rollbacks"] += 1
        self.accelerator.gradient_state._set_sync_gradients(False)  # Trainer goes on to step, which then does nothing
        self._left_out_is(True)
        _LOG.warning(
            "%s: rolled back to the state after step %d; the batches since then are not seen again (rollback %d of %d)",
            *(said, self.snapshot.step, self.rollbacks, self.faults.max_rollbacks),
        )

    def _left_out_is(self, left_out: bool) -> None:
        self._left_out = left_out
        for optimizer in self.accelerator._optimizers:
            optimizer._is_overflow = left_out  # where Trainer looks whether to go on in its schedule

    def take_snapshot(self) -> None:
        """Remember this state as the one to roll back to; by the policy to stop there is no need."""
        if self.faults.on_bad_loss == "rollback":
            self.snapshot = Snapshot.of(self, adapted_model(self))
            self._seen = list(self._watch.losses)

    # -- memory ------------------------------------------------------------------------------------------------

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """The gradients of one micro-batch, and its loss, detached."""
        terms = len(self._regularizers)
        while True:
            try:
                with gradients_apart(self._trained_parameters() if self._can_split(num_items) else ()):
                    return self._sum_of_parts(model, inputs, num_items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0] or type(error).__name__
            # here the error is gone, and with it the frames that held what had been computed
            del self._regularizers[terms:]
            clear_device_cache(garbage_collection=True)
            self._lower_rows(inputs, num_items, said)

    def _sum_of_parts(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        parts = [inputs] if self.rows_at_once is None else parts_of(inputs, self.rows_at_once)
        gradients, last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        total: Tensor | None = None
        try:
            for number, part in enumerate(parts, 1):
                gradients._set_sync_gradients(last and number == len(parts))  # the regulariser counts once
                loss = super().training_step(model, part, num_items)
                total = loss if total is None else total + loss
        finally:
            gradients._set_sync_gradients(last)
        assert total is not None
        return total

    def _lower_rows(self, inputs: Mapping[str, Any], num_items: Any, said: str) -> None:
        """Halve what is computed at once, or raise TrainingError where that cannot be."""
        rows = rows_of(inputs)
        if rows is not None and self.rows_at_once is not None:
            rows = min(rows, self.rows_at_once)
        smaller = "shorten the rows (or the packs), checkpoint activations (activation_checkpointing=True), or quantise"
        if rows == 1:
            raise TrainingError(f"out of memory with a single row: {smaller} the base ({said})")
        fewer = "lower per_device_train_batch_size and raise gradient_accumulation_steps as much"
        if self.faults.on_out_of_memory == "stop":
            raise TrainingError(f"out of memory: {fewer}, or set on_out_of_memory='split' ({said})")
        if self.accelerator.num_processes > 1:
            raise TrainingError(f"out of memory on one of several processes, which do not split by themselves: {fewer}")
        if rows is None or not self._can_split(num_items):
            raise TrainingError(
                f"out of memory, and this batch cannot be split (its loss is a mean, or its tensors are not all one "
                f"row a row): {fewer} ({said})"
            )
        self.rows_at_once = rows // 2
        self._counts["micro_batch_splits"] += 1
        _LOG.warning(
            "out of memory with %d rows at once: from now on %d are computed at once, with the same gradients; to say "
            "so from the start, divide per_device_train_batch_size by %d and multiply gradient_accumulation_steps by "
            "it (%s)",
            *(rows, self.rows_at_once, -(-self.args.per_device_train_batch_size // self.rows_at_once), said),
        )

    def _can_split(self, num_items: Any) -> bool:
        """Whether losses of parts add up to the whole's: where they are sums over the `num_items` of the step."""
        if self.faults.on_out_of_memory == "stop" or num_items is None or self.accelerator.num_processes > 1:
            return False
        return self.compute_loss_func is not None or self._computes_label_only_loss()

    def _trained_parameters(self) -> list[nn.Parameter]:
        if self.optimizer is None:
            return [parameter for parameter in adapted_model(self).parameters() if parameter.requires_grad]
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    # -- gradients ---------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._left_out:
            return math.nan
        unscale_gradients(self.accelerator, self.optimizer)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self._left_out:
            unscale_gradients(self.accelerator, self.optimizer)
        return math.nan if self._left_out else super()._get_grad_norm(model, grad_norm)

    def step_was_taken(self) -> bool:
        """Whether the optimiser has stepped just now; a step that overflowed is warned of."""
        if self._left_out or not self.accelerator.optimizer_step_was_skipped:
            return not self._left_out
        assert self.accelerator.scaler is not None  # nothing else skips a step
        self._counts["skipped_steps"] += 1
        _LOG.warning(
            "step %d: gradients overflowed in float16; the step is skipped and the loss scale is now %g",
            self.state.global_step + 1,
            self.accelerator.scaler.get_scale(),
        )
        return False

    # -- records -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with what went wrong since the last training record, and the scale of the loss."""
        if "loss" in logs and "eval_loss" not in logs:
            if self._counts["rollbacks"]:  # Trainer's mean has counted steps that were left out
                good = self._good_losses
                logs["loss"] = sum(good) / len(good) if good else math.nan
            logs.update(self._counts)
            if self.accelerator.scaler is not None:
                logs["loss_scale"] = self.accelerator.scaler.get_scale()
            self._counts.clear()
            self._good_losses.clear()
        super().log(logs, start_time)
