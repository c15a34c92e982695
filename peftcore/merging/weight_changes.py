"""The weight change ΔW = W' − W of one adapter at one layer: as factors if the method has them, else as a dense tensor.

LoRA (with any scaling, pattern or initialisation), AdaLoRA and VeRA have factors. For every other method, and for DoRA,
whose W' = m/n·(W + sBA) has full rank, ΔW = W' − W is computed in float64, so that the difference keeps its digits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.adapter import Adapter
from peftcore.errors import MergeError
from peftcore.files.tensors import is_sharded
from peftcore.kernels.factors import Factors, inner
from peftcore.methods.lora import Lora


@dataclass(frozen=True)
class Change:
    """The changes ΔW of a layer's weight and Δb of its bias."""

    weight: Factors | Tensor
    """ΔW as factors, or dense (e, o, i): e experts (1 for other layers), i in_features times kernel size."""
    bias: Tensor | None = None
    """Δb (o,); None if the bias does not change."""

    def dense(self) -> Tensor:
        """Return ΔW (e, o, i)."""
        return self.weight.dense() if isinstance(self.weight, Factors) else self.weight

    def inner(self, other: "Change") -> Tensor:
        """Return the inner product ⟨ΔW, other ΔW⟩."""
        if isinstance(self.weight, Factors) and isinstance(other.weight, Factors):
            return inner(self.weight, other.weight)
        return (self.dense() * other.dense()).sum()


def change_of(adapter: Adapter) -> Change:
    """Read an adapter's change, in the type of its parameters or in float32 if that is wider."""
    dtype = torch.promote_types(next(adapter.parameters(), torch.empty(0)).dtype, torch.float32)
    factors = adapter.exact_factors()
    bias = adapter.bias_change()
    bias = None if bias is None else bias.to(dtype)
    if factors is None:
        return Change(dense_change(adapter).to(dtype), bias)
    return Change(Factors(factors.a.to(dtype), factors.b.to(dtype), factors.scaling), bias)


def dense_change(adapter: Adapter) -> Tensor:
    """Return ΔW = W' − W (e, o, i) of the adapter alone on its unmerged base, computed in float64."""
    weight = adapter.base.read_unmerged().double()
    change = adapter.merged_weight(weight) - weight
    return change.reshape(adapter.base.count, adapter.base.out_features, -1)


def check_replaceable(adapter: Adapter, name: str, path: str) -> None:
    """Raise MergeError if no plain LoRA at this layer can replace the adapter."""
    base = adapter.base
    if base.kind not in Lora.layer_kinds:
        raise MergeError(
            f"adapter {name!r} changes {path}, a {base.kind} layer, which LoRA does not support; leave it out"
        )
    if base.kind == "conv" and base.layer.groups > 1:
        raise MergeError(
            f"adapter {name!r} changes {path}, a convolution with groups, where no LoRA equals a weight change; leave "
            "it out"
        )
    if any(map(is_sharded, adapter.parameters())):
        raise MergeError(f"adapter {name!r} is sharded over processes (FSDP); save it and merge it in one process")
    try:
        adapter.check_mergeable()
    except MergeError as error:
        raise MergeError(f"adapter {name!r} at {path} cannot be merged: {error}") from error
