"""A raw parameter of a module, such as the stacked experts of an MoE block or the projections of
nn.MultiheadAttention: no layer of its own ever sees its input.

So an adapter there is folded into the parameter for the length of the module's forward.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases.base import BaseWeight
from peftcore.errors import TargetError


class ParameterWeight(BaseWeight):
    """A parameter (e, o, i) or, where the module says `is_transposed`, (e, i, o); or a single (o, i).

    name: its path from the module: "gate_up_proj", "out_proj.weight".
    """

    kind = "parameter"
    dimensions: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, layer: nn.Module, name: str):
        super().__init__(layer)
        self.name = name
        self.inside, _, self.leaf = name.rpartition(".")
        shape = self._parameter.shape
        if len(shape) not in self.dimensions:
            raise TargetError(f"target_parameters: {name} has shape {tuple(shape)}; only (o, i) and (e, o, i) fit")
        self.transposed = len(shape) == 3 and bool(getattr(layer, "is_transposed", False))

    @property
    def _kept(self) -> dict[str, Any]:
        """Where the parameter is registered, under `leaf`."""
        return self.layer.get_submodule(self.inside)._parameters

    @property
    def _parameter(self) -> Tensor:
        return getattr(self.layer.get_submodule(self.inside), self.leaf)

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
        """Canonical to stored orientation, or back."""
        return weight.transpose(-1, -2) if self.transposed else weight

    def read(self) -> Tensor:
        return self.read_from(self.state())

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.oriented(state[self.leaf].detach())

    def write(self, weight: Tensor) -> None:
        stored = self.oriented(weight).to(self.dtype).contiguous()
        self._kept[self.leaf] = nn.Parameter(stored, requires_grad=False)

    def state(self) -> dict[str, Any]:
        return {self.leaf: self._parameter}

    def restore(self, state: dict[str, Any]) -> None:
        self._kept.update(state)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: its input is not seen")

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: its output is not seen")

    def add_pointwise(self, y: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a raw parameter: its output is not seen")


class BiasParameter(ParameterWeight):
    """A bias (o,) of a module of unknown kind, seen as a parameter of its own."""

    dimensions = (1,)

    @property
    def in_features(self) -> int:
        return 1

    @property
    def out_features(self) -> int:
        return self._parameter.shape[0]
