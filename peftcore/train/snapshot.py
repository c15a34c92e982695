"""In-memory copy of everything that training changes: weights, adapter state, optimiser, schedule, loss scale.

The copy is small: the adapters' weights and the optimiser's moments.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """A state of training that can be restored any number of times."""

    step: int
    """Optimiser steps taken before the snapshot (count)."""
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """Return the state of an `AdapterTrainerMixin` after its optimiser and schedule were made."""
        model, scaler = trainer.adapted_model, trainer.accelerator.scaler
        return cls(
            step=trainer.state.global_step,
            weights={name: p.detach().clone() for name, p in _trained(model)},
            adapters={name: tensor.detach().clone() for name, tensor in model.adapter_state().items()},
            optimizer=deepcopy(trainer.optimizer.state_dict()),
            schedule=deepcopy(trainer.lr_scheduler.state_dict()),
            scaler=None if scaler is None else deepcopy(scaler.state_dict()),
        )

    @torch.no_grad()
    def restore(self, trainer: Any) -> None:
        """Restore the state in place; a parameter that was pruned since gets its earlier shape."""
        model = trainer.adapted_model
        for name, parameter in _trained(model):
            saved = self.weights[name]
            if parameter.shape == saved.shape:
                parameter.copy_(saved)
            else:
                parameter.data = saved.clone()
            parameter.grad = None
        model.load_adapter_state(deepcopy(self.adapters))
        trainer.optimizer.load_state_dict(deepcopy(self.optimizer))  # the optimiser changes loaded tensors in place
        trainer.lr_scheduler.load_state_dict(deepcopy(self.schedule))
        if self.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(self.scaler)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
