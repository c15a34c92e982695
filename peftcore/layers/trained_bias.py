"""Biases of the base that train with an adapter: `bias="all"`, `bias="lora_only"` and its kin.

The base keeps its bias b. The adapter holds a bias b' of its own and adds b' − b to the layer's output, after the
method's own change. So b' acts where and when its adapter acts: not while adapters are disabled, not for another
adapter, and row by row in a mixed batch.

Shapes: o out_features.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.bases.current_parameters import call_with_parameters
from peftcore.errors import RoutingError

_ADDS_ITS_BIAS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, Conv1D)}
"""Forwards whose output is something plus the bias."""


class TrainedBias(Adapter):
    """A trained bias (o,) of one layer, of the name of the adapter that it trains with."""

    changes_weight = False
    bias: nn.Parameter
    """b', in float32 or wider; it starts at the base's bias."""

    def __init__(self, base: BaseWeight, path: str, bias: nn.Parameter | None = None):
        """bias: the parameter of another layer that shares the base's bias with this one."""
        super().__init__(None, base, path)
        self.path = path
        own = self._own()
        wide = torch.promote_types(own.dtype, torch.float32)
        self.bias = nn.Parameter(own.detach().to(wide, copy=True)) if bias is None else bias
        adds = base.quantized or type(base.layer).forward in _ADDS_ITS_BIAS
        vars(self).update(adds_its_bias=adds)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}"

    def _own(self) -> Tensor:
        """b, without what is merged into it."""
        bias = self.base.unmerged_bias
        assert bias is not None
        return bias

    def change(self) -> Tensor:
        """b' − b (o,)."""
        return self.bias - self._own()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.adds_its_bias:
            return y + self.base.per_output(self.change()).to(y.dtype)
        layer = self.base.layer  # of a class whose forward may scale the bias, or put it on another axis
        bias = (layer.bias + self.change()).to(layer.bias)
        changed, plain = call_with_parameters(layer, {"bias": bias}, (x,)), layer(x)
        if not isinstance(plain, Tensor):
            raise RoutingError(
                f"{self.path} is a {type(layer).__name__}, which gives more than a tensor, so what its bias adds is "
                "not known; train it with bias='none'"
            )
        return y + (changed - plain)

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        assert bias is not None
        return self.bias if bias is self._own() else bias + self.change()


class TrainedBiasParameter(TrainedBias):
    """A trained bias of a module of unknown kind: it stands in the base's place while the module's forward runs."""

    changes_weight = True

    def _own(self) -> Tensor:
        return self.base.read_unmerged()

    def merged_weight(self, weight: Tensor) -> Tensor:
        return (weight + self.change()).to(weight.dtype)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias
