"""All that training changes, copied in memory: trained weights, the adapters' own state, optimiser, schedule, scale.

What is copied is as small as the adapters: their weights once, and the optimiser's moments.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftcore.model import PeftModel


@dataclass(frozen=True)
class Snapshot:
    """A state of training that one can go back to, any number of times."""

    step: int
    """Optimiser steps that had been taken (count)."""
    weights: dict[str, Tensor]
    adapters: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None

    @classmethod
    def of(cls, trainer: Any, model: PeftModel | nn.Module) -> Self:
        """The state of a Trainer whose training is prepared, and of its model."""
        adapted: Any = model
        scaler = trainer.accelerator.scaler
        return cls(
            step=trainer.state.global_step,
            weights={name: p.detach().clone() for name, p in _trained(adapted)},
            adapters={name: tensor.detach().clone() for name, tensor in adapted.adapter_state().items()},
            optimizer=deepcopy(trainer.optimizer.state_dict()),
            schedule=deepcopy(trainer.lr_scheduler.state_dict()),
            scaler=None if scaler is None else deepcopy(scaler.state_dict()),
        )

    @torch.no_grad()
    def restore(self, trainer: Any, model: PeftModel | nn.Module) -> None:
        """Put all of it back; a parameter that has been pruned since gets its old shape again."""
        adapted: Any = model
        for name, parameter in _trained(adapted):
            saved = self.weights[name]
            if parameter.shape == saved.shape:
                parameter.copy_(saved)
            else:
                parameter.data = saved.clone()
            parameter.grad = None
        adapted.load_adapter_state(deepcopy(self.adapters))
        trainer.optimizer.load_state_dict(deepcopy(self.optimizer))  # an optimiser steps in the tensors it is given
        trainer.lr_scheduler.load_state_dict(deepcopy(self.schedule))
        if self.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(self.scaler)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
