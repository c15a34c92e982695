"""`peft.tuners.lora.dora`: the modules that compute DoRA in HF PEFT's layers, for scripts that call them themselves.

The layers of a model do not contain such modules (`peftcore.methods.lora.variants.dora`). `isinstance` is also true for
`layer.lora_magnitude_vector["default"]`, by the kind of the layer. See DoRA, arXiv:2402.09353, section 4.3.

Shapes: i in_features, o out_features, r rank; base weight and change BA (o, i).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import transpose
from peftcore.hf_peft.utils.integrations import dequantize_module_weight
from peftcore.layers.factor_view import FactorView

__all__ = ["DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer", "DoraEmbeddingLayer", "DoraLinearLayer"]


class _OfMagnitude(type):
    """Metaclass for `isinstance` of the magnitude vectors of a model's layers."""

    layer_types: tuple[type[nn.Module], ...]

    def __instancecheck__(cls, instance: Any) -> bool:
        if type.__instancecheck__(cls, instance):
            return True
        if not isinstance(instance, FactorView):
            return False
        adapter, parameters = instance._of_adapter
        is_magnitude = any("magnitude" in name for name in parameters.values())
        return is_magnitude and isinstance(adapter.base.layer, cls.layer_types)  # type: ignore[attr-defined]


class DoraLinearLayer(nn.Module, metaclass=_OfMagnitude):
    """The magnitudes of a layer's rows, and the change of its output by DoRA.

    Args:
        fan_in_fan_out: True for a base layer that stores its weight as (i, o).
    """

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)
    weight: nn.Parameter
    """Magnitude of each row (o,), after `update_layer`."""

    def __init__(self, fan_in_fan_out: bool):
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the length of each row (o,) of the changed weight.

        Args:
            weight: the base weight, as the layer stores it.
            lora_weight: the change BA (o, i).
            scaling: the factor of the change.
            adapter_name: without effect: nothing is cached.
        """
        changed = transpose(weight, self.fan_in_fan_out) + scaling * lora_weight
        return torch.linalg.vector_norm(changed, dim=1).to(weight.dtype)

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        """Return the change BA (o, i).

        Args:
            lora_A: a linear module with the weight (r, i).
            lora_B: a linear module with the weight (o, r).
            adapter_name: without effect: nothing is cached.
        """
        return lora_B.weight @ lora_A.weight

    @torch.no_grad()
    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Set the magnitudes to the lengths of the rows of the changed weight.

        Args:
            base_layer: the layer without adapters; it may be quantised.
            lora_A: A, with r rows.
            lora_B: B, with o rows.
            scaling: the factor of the change.
            place_on_cpu: True keeps the magnitudes on the CPU.
        """
        weight = dequantize_module_weight(base_layer).to(lora_A.device)
        change = lora_B.flatten(1) @ lora_A.flatten(1)
        norm = self.get_weight_norm(weight, change.view(weight.shape) if weight.dim() > 2 else change, scaling)
        self.weight = nn.Parameter(norm.to("cpu") if place_on_cpu else norm)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Return what DoRA adds to the base layer's output.

        Args:
            x: the input.
            lora_A: the module of A.
            lora_B: the module of B.
            scaling: the factor of the change.
            base_layer: the layer without adapters; it may be quantised.
            base_result: its output; None to compute it without a bias.
            adapter_name: without effect: nothing is cached.
        """
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        change = self.get_lora_weight(lora_A, lora_B).detach().to(x.dtype)
        change = change.view(weight.shape) if weight.dim() > 2 else change
        factor = self.weight / self.get_weight_norm(weight, change, scaling).detach()
        result = self._without_bias(x, weight, base_layer) if base_result is None else base_result
        if base_result is not None and base_layer.bias is not None:
            result = result - base_layer.bias.view(-1, *(1 for _ in weight.shape[2:]))
        return (factor - 1) * result + factor * lora_B(lora_A(x)) * scaling

    def _without_bias(self, x: Tensor, weight: Tensor, base_layer: Any) -> Tensor:
        return F.linear(x, transpose(weight, self.fan_in_fan_out))


class DoraEmbeddingLayer(DoraLinearLayer):
    """DoRA of an embedding. Its weight is (rows, o), so `fan_in_fan_out` is True."""

    layer_types = (nn.Embedding,)

    def get_lora_weight(self, lora_A: Tensor, lora_B: Tensor, adapter_name: str | None = None) -> Tensor:
        """Return the change (o, rows), for A (rows, r) and B (r, o)."""
        return (lora_A @ lora_B).T

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        base_layer: nn.Embedding,
        embed_fn: Callable[[Tensor, Tensor], Tensor],
        adapter_name: str = "default",
    ) -> tuple[Tensor, Tensor]:
        """Return the factor (o,) of the base layer's output, and what DoRA adds to the product.

        Args:
            x: ids of rows.
            lora_A: A (rows, r).
            lora_B: B (r, o).
            scaling: the factor of the change.
            base_layer: the embedding without adapters.
            embed_fn: function that takes the rows `x` from a matrix.
            adapter_name: without effect: nothing is cached.
        """
        change = self.get_lora_weight(lora_A, lora_B).detach()
        factor = self.weight / self.get_weight_norm(base_layer.weight, change, scaling).detach()
        return factor, factor * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """DoRA of a convolution; its magnitudes are (1, o, 1, ...)."""

    convolve: ClassVar[Any]

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        changed = weight + scaling * lora_weight
        return torch.linalg.vector_norm(changed, dim=tuple(range(1, changed.dim())), keepdim=True).transpose(0, 1)

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        return lora_B.weight.flatten(1) @ lora_A.weight.flatten(1)

    def _without_bias(self, x: Tensor, weight: Tensor, base_layer: Any) -> Tensor:
        options = {name: getattr(base_layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return self.convolve(x, weight, None, **options)


class DoraConv1dLayer(_DoraConvNdLayer):
    """DoRA of an nn.Conv1d."""

    layer_types = (nn.Conv1d,)
    convolve = staticmethod(F.conv1d)


class DoraConv2dLayer(_DoraConvNdLayer):
    """DoRA of an nn.Conv2d."""

    layer_types = (nn.Conv2d,)
    convolve = staticmethod(F.conv2d)


class DoraConv3dLayer(_DoraConvNdLayer):
    """DoRA of an nn.Conv3d."""

    layer_types = (nn.Conv3d,)
    convolve = staticmethod(F.conv3d)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
