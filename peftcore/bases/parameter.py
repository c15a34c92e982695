"""Raw parameters of a module that are not the weight of a layer.

Examples are the stacked experts of an MoE block and the projections of nn.MultiheadAttention. No layer receives the
input of such a parameter, so an adapter replaces the parameter by its merged value during the module's forward.

Shapes: e experts, o out_features, i in_features.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases.base import BaseWeight
from peftcore.errors import TargetError


class ParameterWeight(BaseWeight):
    """A parameter of shape (o, i) or (e, o, i); (e, i, o) if the module has a true attribute `is_transposed`.

    Args:
        layer: The module that holds the parameter.
        name: The parameter's path, relative to the module, such as "gate_up_proj" or "out_proj.weight".
    """

    kind = "parameter"
    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    """Numbers of dimensions that the parameter may have."""

    def __init__(self, layer: nn.Module, name: str):
        super().__init__(layer)
        self.name = name
        self.owner_path, _, self.leaf = name.rpartition(".")
        shape = self._parameter.shape
        if len(shape) not in self.dimensions:
            raise TargetError(f"target_parameters: {name} has shape {tuple(shape)}; only (o, i) and (e, o, i) fit")
        self.transposed = len(shape) == 3 and bool(getattr(layer, "is_transposed", False))

    @property
    def _registered(self) -> dict[str, Any]:
        """The parameter dictionary of the submodule that owns the parameter."""
        return self.layer.get_submodule(self.owner_path)._parameters

    @property
    def _parameter(self) -> Tensor:
        return getattr(self.layer.get_submodule(self.owner_path), self.leaf)

    @property
    def in_features(self) -> int:
        return self._parameter.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self._parameter.shape[-1 if self.transposed else -2]

    @property
    def count(self) -> int:
        return self._parameter.shape[0] if self._parameter.dim() == 3 else 1

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def bias(self) -> None:
        return None

    @property
    def unmerged_attribute(self) -> str:
        return f"_unmerged_state_of_{self.name.replace('.', '_')}"

    def oriented(self, weight: Tensor) -> Tensor:
        """Convert a weight from canonical to stored orientation, or back."""
        return weight.transpose(-1, -2) if self.transposed else weight

    def read(self) -> Tensor:
        return self.read_from(self.state())

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.oriented(state[self.leaf].detach())

    def write(self, weight: Tensor) -> None:
        stored = self.oriented(weight).to(self.dtype).contiguous()
        self._registered[self.leaf] = nn.Parameter(stored, requires_grad=False)

    def state(self) -> dict[str, Any]:
        return {self.leaf: self._parameter}

    def restore(self, state: dict[str, Any]) -> None:
        self._registered.update(state)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: no layer receives its input")

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: no layer returns its output")

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: no layer returns its output")


class BiasParameter(ParameterWeight):
    """The bias (o,) of a module that has no view of its own, as a raw parameter."""

    dimensions = (1,)

    @property
    def in_features(self) -> int:
        return 1

    @property
    def out_features(self) -> int:
        return self._parameter.shape[0]
