"""The loss of a training step and the metrics of an evaluation set.

`TokenObjective` is next-token cross entropy over the supervised tokens of the whole accumulated batch, on all
processes. Rows may have weights:

    loss = Σ_b w_b Σ_t ℓ_bt / Σ_b w_b n_b

If the model or the trainer has another loss, `TokenObjective` leaves that loss alone.

Shapes: B rows, T positions, n_b supervised tokens of row b.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.batches import WEIGHT
from peftcore.train.losses import (
    row_sums,
    supervised_positions,
    token_losses,
    token_weights,
)
from peftcore.train.model_loss import ModelLossCheck, has_causal_loss
from peftcore.train.out_of_memory import split_rows
from peftcore.train.supervised_head import is_compiled


class Objective:
    """Interface between a trainer and its loss. An item is a supervised token, or an example."""

    returns_outputs: ClassVar[bool] = True
    """True if `compute_loss` can also return the model's outputs, from which Trainer takes predictions."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def check(self) -> None:
        """Raise TrainingError if the trainer's arguments do not fit this objective."""

    def reset(self) -> None:
        """Forget the records of an earlier run."""

    def state(self) -> dict[str, Any]:
        """Return the values (JSON types and tensors) with which a resumed run continues. A collective call."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values that `state` returned."""

    def columns(self, signature: list[str]) -> list[str]:
        """Return the dataset columns to keep. `signature` holds the arguments of the model's forward."""
        return signature if WEIGHT in signature else [*signature, WEIGHT]

    def lengths(self, dataset: Any) -> list[int]:
        """Return the tokens of each row, by which rows are grouped into batches."""
        column = self.trainer.args.length_column_name
        if column in (getattr(dataset, "column_names", None) or ()):
            return list(dataset[column])
        return [len(row["input_ids"]) for row in dataset]

    # -- training ----------------------------------------------------------------------------------------------

    def is_sum_over_items(self) -> bool:
        """Return True if the loss is a sum over items divided by the number of items of the optimiser step.

        The losses of parts of a batch then add up to the loss of the batch.
        """
        raise NotImplementedError

    def parts(self, inputs: dict[str, Any], rows: int) -> list[dict[str, Any]]:
        """Return a batch in parts whose losses add up, because a forward pass of more than `rows` rows does not fit."""
        return split_rows(inputs, rows)

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, return_outputs: bool
    ) -> Tensor | None:
        """Return the loss of one forward pass, a scalar. None if the base trainer must compute its own loss.

        Args:
            model: The model as Trainer wraps it.
            inputs: A batch on the model's device.
            num_items: Summed weight of the items of the optimiser step. None: return the mean of this batch.
            return_outputs: True if the caller also needs the model's outputs.
        """
        raise NotImplementedError

    def batch_weight(self, batch: Any) -> Tensor:
        """Return the summed weight of a batch's items, a scalar."""
        raise NotImplementedError

    def step_weight(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """Return the summed weight of an optimiser step's items on all processes. None if no batch has weights."""
        if not any(WEIGHT in batch for batch in batches):
            return None
        trainer = self.trainer
        total = torch.stack([self.batch_weight(batch).to(device) for batch in batches]).sum()
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            total = cast(Tensor, trainer.accelerator.gather(total)).sum()
        return total / (trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size())

    def share_of_mean(self, total: Tensor, num_items: Tensor | int) -> Tensor:
        """Return the contribution of a summed loss to the mean over the `num_items` items of the optimiser step.

        The contribution to a step without items is 0.
        """
        items = torch.as_tensor(num_items, device=total.device)
        loss = total / items.where(items > 0, torch.ones_like(items))
        if self.trainer.args.average_tokens_across_devices:  # processes average their gradients
            loss = loss * (self.trainer.accelerator.num_processes // self.trainer.get_tp_size())
        return loss

    def unrecorded(self) -> list[Any]:
        """Return the list to which forward passes of training append; a rollback removes what its step appended."""
        return []

    def record(self) -> dict[str, float]:
        """Return metrics of the steps since the last training record, and forget those steps. A collective call."""
        return {}

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return True if `row_metrics` may replace the base trainer's evaluation of this batch."""
        raise NotImplementedError

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return metrics of each row, (B,), without gradients; `loss` is among them."""
        raise NotImplementedError

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return metrics of the whole evaluation set from the row metrics of its batches; `loss` is among them."""
        raise NotImplementedError


class TokenObjective(Objective):
    """Next-token cross entropy, computed at supervised tokens only."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._model_loss = ModelLossCheck()

    def is_sum_over_items(self) -> bool:
        """Return True if trainer and model minimise plain next-token cross entropy."""
        trainer = self.trainer
        return (
            not self._model_loss.differs
            and self._base_trainer_uses_model_loss()
            and trainer.label_smoother is None
            and trainer.compute_loss_func is None
            and trainer.model_accepts_loss_kwargs
            and trainer.args.n_gpu <= 1
            and getattr(trainer.accelerator, "parallelism_config", None) is None
            and has_causal_loss(trainer.adapted_model)
            and not any(prompt.defines_loss for prompt in adapter_set(trainer.adapted_model).prompts_in_effect())
        )

    def _base_trainer_uses_model_loss(self) -> bool:
        """Return False if the base trainer has its own objective, such as DPO or a user's `compute_loss`."""
        owner = next(each for each in self.trainer.base_trainer_classes() if "compute_loss" in vars(each))
        if owner.__name__ == "SFTTrainer":  # TRL's "nll" loss is the same number, computed in another way
            return getattr(self.trainer.args, "loss_type", "nll") == "nll"
        return owner is Trainer

    def loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, return_outputs: bool
    ) -> Tensor | None:
        """Return the loss over supervised tokens. None for other losses, and for compiled models without weights.

        Raises:
            TrainingError: The rows have weights, and the loss in use cannot apply weights.
        """
        has_plain_labels = "labels" in inputs and "shift_labels" not in inputs and not return_outputs
        applies = has_plain_labels and self.is_sum_over_items() and self.evaluates_rows(model, inputs)
        if WEIGHT in inputs and not applies:
            raise TrainingError(
                f"rows have weights, but the loss of this {type(self.trainer.adapted_model).__name__} cannot apply "
                "them: weights need plain next-token cross entropy (no additional loss terms, no label smoothing, no "
                f"compute_loss_func) and prediction_loss_only=True; change those, or remove the column {WEIGHT!r}"
            )
        if not applies or (is_compiled(model) and WEIGHT not in inputs):
            return None
        losses, mask = token_losses(model, _forward_arguments(inputs), inputs["labels"])
        if WEIGHT in inputs:
            weights = token_weights(inputs[WEIGHT], mask).to(losses)
            total = (losses * weights).sum()
            return total / weights.sum() if num_items is None else self.share_of_mean(total, num_items)
        return losses.mean() if num_items is None else self.share_of_mean(losses.sum(), num_items)

    def batch_weight(self, batch: Any) -> Tensor:
        """Return the summed weight of a batch's supervised tokens, a scalar; without weights, each token weighs 1."""
        mask = supervised_positions(batch["labels"])
        return token_weights(batch[WEIGHT], mask).sum() if WEIGHT in batch else mask.sum().float()

    def evaluates_rows(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return True if the model's own loss of this batch is the mean over its supervised tokens."""
        if is_compiled(model):
            return True  # a compiled model keeps its own loss; only weighted rows have no other loss
        return self._model_loss.agrees(model, _forward_arguments(inputs), inputs["labels"])

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return summed `loss` (nats), supervised `tokens` and, if rows have weights, summed `weight`, each (B,)."""
        losses, mask = token_losses(model, _forward_arguments(inputs), inputs["labels"])
        if WEIGHT not in inputs:
            sums, counts = row_sums(losses, mask)
            return {"loss": sums, "tokens": counts}
        weights = token_weights(inputs[WEIGHT], mask).to(losses)
        sums, counts = row_sums(losses * weights, mask)
        return {"loss": sums, "tokens": counts, WEIGHT: row_sums(weights, mask)[0]}

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the (weighted) mean `loss` per token in nats, and the number of supervised `tokens`."""
        loss = sum(batch["loss"].double().sum().item() for batch in batches)
        tokens = sum(int(batch["tokens"].sum()) for batch in batches)
        if not tokens:
            raise TrainingError("the evaluation set has no supervised token; check its labels")
        weight = sum(batch.get(WEIGHT, batch["tokens"]).double().sum().item() for batch in batches)
        return {"loss": loss / weight if weight else math.nan, "tokens": tokens}


def _forward_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}
