"""What an adapter method writes: a little mathematics. Everything else is the host's.

One `Adapter` is the adapter of one name at one layer. A method defines `delta_weight` (or `merged_weight`), and
`before`/`after` where it can do better than rebuilding ΔW in every forward.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases import BaseWeight


class Adapter(nn.Module):
    """One adapter at one layer. Shapes: o out_features, i in_features, y (..., o), x (..., i)."""

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Kinds of base layer that the method can adapt: "linear", "conv", "embedding"."""

    def __init__(self, config: Any, base: BaseWeight, path: str):
        """Make the parameters for `base`, the layer at module `path`; raise ConfigError for what cannot be."""
        super().__init__()
        self.base = base

    def reset_parameters(self) -> None:
        """Set the start state; the adapted layer then computes what its base does unless the paper says otherwise."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters")

    # -- forward ---------------------------------------------------------------------------------------------

    def before(self, x: Tensor) -> Tensor:
        """The input that the base layer sees, for the adapter's own input x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The output, for the adapter's own input x and the base's output y (bias included)."""
        return y + self.base.apply(x, self.delta_weight()).to(y.dtype)

    # -- merged ----------------------------------------------------------------------------------------------

    def delta_weight(self) -> Tensor:
        """ΔW in canonical orientation, in the parameters' type; for methods where W' = W + ΔW."""
        raise NotImplementedError(f"{type(self).__name__} must define delta_weight or merged_weight")

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W' for a canonical W given in float32 or float64."""
        return weight + self.delta_weight().to(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """b' for the layer's bias (o,); None where there is none."""
        return bias

    # -- disk ------------------------------------------------------------------------------------------------

    def checkpoint_keys(self) -> dict[str, str]:
        """{parameter name: its suffix on PEFT's disk}; the same word unless the method says otherwise."""
        return {name: name for name, _ in self.named_parameters()}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What is saved: {suffix on disk: tensor}."""
        return {key: self.get_parameter(name).detach() for name, key in self.checkpoint_keys().items()}

    @torch.no_grad()
    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors in; names and shapes have been checked against `checkpoint_tensors`."""
        for name, key in self.checkpoint_keys().items():
            self.get_parameter(name).copy_(tensors[key])

    @classmethod
    def config_to_save(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Any:
        """The configuration to write beside the tensors, for the adapters of one name by path."""
        return config

    # -- training --------------------------------------------------------------------------------------------

    @classmethod
    def regularizer(cls, config: Any, adapters: Mapping[str, "Adapter"]) -> Tensor | None:
        """A scalar to add to the loss once per optimiser step, for the adapters of one name; None for none."""
        return None

    @classmethod
    def on_step(
        cls,
        config: Any,
        adapters: Mapping[str, "Adapter"],
        step: int,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Work after the optimiser's step and before its gradients are cleared; step counts from 1."""

    def training_state(self) -> dict[str, Tensor]:
        """What resuming needs beyond `checkpoint_tensors`, such as moving averages."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `training_state` gave."""
