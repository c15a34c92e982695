"""What one adapter changes at one layer: by its factors where it has them, dense where it has not.

LoRA (whatever its scaling, patterns or start), AdaLoRA and VeRA have factors. Of every other method, and of DoRA, whose
W' = m/n·(W + sBA) is of full rank, ΔW = W'(W) − W is formed in float64, so that the difference keeps its digits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore._util.tensors import is_sharded
from peftcore.adapter import Adapter
from peftcore.errors import MergeError
from peftcore.kernels.low_rank import Factors
from peftcore.merging.factors import inner
from peftcore.methods.lora import Lora


@dataclass(frozen=True)
class Change:
    """ΔW of a layer, and Δb of its bias."""

    weight: Factors | Tensor
    """Factors, or dense (e, o, i); i counts a convolution's kernel too."""
    bias: Tensor | None = None
    """(o,); None where it does not change."""

    def dense(self) -> Tensor:
        """ΔW (e, o, i)."""
        return self.weight.dense() if isinstance(self.weight, Factors) else self.weight

    def inner(self, other: "Change") -> Tensor:
        """⟨ΔW, other ΔW⟩."""
        if isinstance(self.weight, Factors) and isinstance(other.weight, Factors):
            return inner(self.weight, other.weight)
        return (self.dense() * other.dense()).sum()


def change_of(adapter: Adapter) -> Change:
    """Read an adapter, in its own type, float32 at least."""
    dtype = torch.promote_types(next(adapter.parameters(), torch.empty(0)).dtype, torch.float32)
    weight = adapter.exact_factors()
    if weight is not None:
        weight = Factors(weight.a.to(dtype), weight.b.to(dtype), weight.scaling)
    bias = adapter.bias_change()
    return Change(_dense(adapter).to(dtype) if weight is None else weight, None if bias is None else bias.to(dtype))


def _dense(adapter: Adapter) -> Tensor:
    weight = adapter.base.read_unmerged().double()
    change = adapter.merged_weight(weight) - weight
    return change.reshape(adapter.base.count, adapter.base.out_features, -1)


def check_combinable(adapter: Adapter, name: str, path: str) -> None:
    """Raise MergeError if no plain LoRA at this layer can stand for the adapter."""
    base = adapter.base
    if base.kind not in Lora.layer_kinds:
        raise MergeError(f"adapter {name!r} changes {path}, a {base.kind} layer, and a LoRA has no place there")
    if base.kind == "conv" and base.layer.groups > 1:
        raise MergeError(f"adapter {name!r} changes {path}, a convolution with groups, whose LoRA is no weight")
    if any(map(is_sharded, adapter.parameters())):
        raise MergeError(f"adapter {name!r} is spread over processes (FSDP); save it and combine it in one process")
    try:
        adapter.check_mergeable()
    except MergeError as error:
        raise MergeError(f"adapter {name!r} at {path} cannot be combined: {error}") from error
