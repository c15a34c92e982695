"""Base of objectives that compare the model with a frozen reference on the same base weights: DPO, KTO.

The reference is the model as it was when the trainer was made, the base without adapters, or a frozen adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.model_loss import has_causal_loss
from peftcore.train.reference import reference_acting, reference_model

Reference = Literal["start", "base"]


class ReferenceObjective(ExampleObjective):
    """Weighted mean over examples whose losses may need the reference's log-probabilities.

    Args:
        trainer: The trainer that minimises this objective.
        reference: "start": the model as it is when the trainer is made, of which a frozen copy of the adapters is
            kept. "base": the model without adapters. Both are the same model for adapters that start at zero.
        ref_adapter_name: A frozen adapter that is the reference instead.

    Raises:
        TrainingError: `reference` is neither "start" nor "base".
    """

    examples: ClassVar[str]
    """Name of the examples, for messages."""

    def __init__(self, trainer: Any, reference: Reference, ref_adapter_name: str | None) -> None:
        super().__init__(trainer)
        if reference not in get_args(Reference):
            raise TrainingError(f"reference must be one of {', '.join(get_args(Reference))}; got {reference!r}")
        self.reference = reference
        self.ref_adapter_name = ref_adapter_name
        self.start_model: Any = None
        """Frozen copy of the model as it was when the trainer was made, if that is the reference."""

    @property
    def uses_reference(self) -> bool:
        """True if the loss needs the reference's log-probabilities."""
        return True

    def check(self) -> None:
        """Raise TrainingError also for a model without next-token logits, or a trained reference adapter."""
        super().check()
        model, name = self.trainer.adapted_model, self.ref_adapter_name
        if not has_causal_loss(model):
            raise TrainingError(f"{self.examples} need a causal language model; {type(model).__name__} is not one")
        if name is not None:
            adapters = adapter_set(model)
            adapters.require(name)
            if any(parameter.requires_grad for parameter in adapters.parameters(name)):
                raise TrainingError(
                    f"the reference adapter {name!r} is trained; load it with is_trainable=False, or freeze it with "
                    "set_requires_grad"
                )
        if self.reference == "start" and name is None and self.uses_reference:
            if self.trainer.is_fsdp_enabled:
                raise TrainingError(
                    "reference='start' keeps a copy of the model that shares the base's weights, and FSDP shards "
                    "those; give reference='base' if the adapter is new, or ref_adapter_name, a frozen adapter"
                )
            self.start_model = reference_model(model)

    @contextmanager
    def reference_in_effect(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the model whose outputs are the reference's inside the context, in evaluation mode without gradients.

        Args:
            model: The model as Trainer wraps it.
        """
        with self.trainer.accelerator.autocast():  # Trainer prepares only the trained model for mixed precision
            if self.start_model is not None:
                with torch.no_grad():
                    yield self.start_model
            else:
                with reference_acting(self.trainer.adapted_model, self.ref_adapter_name):
                    yield model
