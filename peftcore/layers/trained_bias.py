"""Biases that train with an adapter: `bias="all"`, `bias="lora_only"` and similar.

The base keeps its bias b. The adapter has a bias b' of its own, and adds b' − b to the layer's output after the
method's own change. So b' has an effect only where its adapter is in effect: not while adapters are disabled, not for
another adapter, and in a mixed batch only in the rows of its adapter.

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
"""Forward functions whose output is a term without the bias, plus the bias."""


class TrainedBias(Adapter):
    """The trained bias (o,) of one layer, under the name of its adapter.

    Args:
        base: the view on the layer; a layer with a bias.
        path: the layer's path in the model.
        bias: the trained bias of another layer, if both share one bias in the base; None makes a new parameter.
    """

    changes_weight = False
    bias: nn.Parameter
    """b', in float32 or wider; initialised to the base's bias."""

    def __init__(self, base: BaseWeight, path: str, bias: nn.Parameter | None = None):
        super().__init__(None, base, path)
        self.path = path
        unmerged = self._unmerged()
        wide = torch.promote_types(unmerged.dtype, torch.float32)
        self.bias = nn.Parameter(unmerged.detach().to(wide, copy=True)) if bias is None else bias
        adds = base.quantized or type(base.layer).forward in _ADDS_ITS_BIAS
        vars(self).update(adds_its_bias=adds)

    def extra_repr(self) -> str:
        """Return the number of elements."""
        return f"{len(self.bias)}"

    def _unmerged(self) -> Tensor:
        """Return b without merged adapters."""
        bias = self.base.unmerged_bias
        assert bias is not None
        return bias

    def change(self) -> Tensor:
        """Return b' − b (o,)."""
        return self.bias - self._unmerged()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with b in it replaced by b'."""
        if self.adds_its_bias:
            return y + self.base.per_output(self.change()).to(y.dtype)
        layer = self.base.layer  # its forward may scale the bias, or put it on another axis
        bias = (layer.bias + self.change()).to(layer.bias)
        changed, plain = call_with_parameters(layer, {"bias": bias}, (x,)), layer(x)
        if not isinstance(plain, Tensor):
            raise RoutingError(
                f"{self.path} is a {type(layer).__name__}, which returns more than a tensor, so the effect of its bias "
                "is unknown; train the adapter with bias='none'"
            )
        return y + (changed - plain)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W itself."""
        return weight

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return b', or bias + b' − b if other adapters have changed the bias before."""
        assert bias is not None
        return self.bias if bias is self._unmerged() else bias + self.change()


class TrainedBiasParameter(TrainedBias):
    """The trained bias of a module of unknown kind: replaces the base's bias while the module's forward runs."""

    changes_weight = True

    def _unmerged(self) -> Tensor:
        return self.base.read_unmerged()

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the bias parameter, which this class sees as the weight, plus b' − b."""
        return (weight + self.change()).to(weight.dtype)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias unchanged."""
        return bias
