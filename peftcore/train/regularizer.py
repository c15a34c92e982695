"""The adapters' regulariser in a training step: added once per optimiser step, logged apart from the task's loss."""

from typing import Any

import torch
from torch import Tensor


class Regularizer:
    """Sum of the adapters' regularisers (orthogonality of AdaLoRA, for example) for one trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.values: list[Tensor] = []
        """Detached values of the steps since the last training record."""

    def add_to(self, loss: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Return `loss` with the regulariser's gradient added; the value stays the task's loss."""
        regularizer = self.trainer.adapted_model.adapter_regularizer()
        if regularizer is None:
            return loss
        self.values.append(regularizer.detach())
        if not self._loss_is_scaled(num_items):  # Trainer will divide this loss by the accumulation steps
            regularizer = regularizer * self.trainer.current_gradient_accumulation_steps
        return loss + (regularizer - regularizer.detach()).to(loss)

    def _loss_is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Return True if `compute_loss` already divides by the gradient accumulation steps."""
        trainer = self.trainer
        if trainer.loss_is_scaled_for_ga is not None:
            return trainer.loss_is_scaled_for_ga
        return (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None

    def record(self) -> dict[str, float]:
        """Return the mean `regularizer` of the steps since the last training record, and forget those steps."""
        if not self.values:
            return {}
        mean = torch.stack(self.values).mean().item()
        self.values.clear()
        return {"regularizer": mean}
