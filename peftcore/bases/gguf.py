"""Linear layers whose weight stays in the packed blocks of a GGUF file, and is dequantised in each forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.bases.gguf_blocks import FORMATS, BlockFormat
from peftcore.bases.grid import Grid
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import register_storage
from peftcore.errors import MergeError, require_extra


class GgufLinear(nn.Linear):
    """y = x Wᵀ + b with W in the blocks of a GGUF format.

    `weight` holds the planes (n, b, o) of `gguf_blocks`, uint8 and frozen, so that `to`, `half` and the like move the
    weight and never cast it. The product is computed in the dtype of x, or in autocast's.

    Args:
        in_features: i; a multiple of the format's block.
        out_features: o.
        format_name: A name of `gguf_blocks.FORMATS`, such as "Q4_K".
        bias: True adds a bias, in the dtype `compute_dtype`.
        compute_dtype: The dtype of the activations for which the layer is made; new adapters start with values of its
            precision.
        device: Device of the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format_name: str,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format_name, self.compute_dtype = format_name, compute_dtype
        block = self.format
        shape = (in_features // block.weights, block.size, out_features)
        planes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(planes, requires_grad=False)
        values = torch.zeros(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @property
    def format(self) -> BlockFormat:
        """The format of the blocks."""
        return FORMATS[self.format_name]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight (o, i), rounded from float32 to `dtype`."""
        return self.format.dequantize(self.weight, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b (..., o)."""
        dtype = _product_dtype(input)
        y = _Product.apply(input.to(dtype), self.weight, self.format_name)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Return the sizes and the format."""
        return f"{super().extra_repr()}, format={self.format_name}"


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    casts = x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


class _Product(torch.autograd.Function):
    """x Wᵀ, which saves the packed weight for the backward pass and dequantises it again there."""

    @staticmethod
    def forward(x: Tensor, planes: Tensor, format_name: str) -> Tensor:
        return F.linear(x, FORMATS[format_name].dequantize(planes, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, planes, ctx.format_name = inputs
        ctx.save_for_backward(planes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (planes,), (g,) = ctx.saved_tensors, gradients
        return g @ FORMATS[ctx.format_name].dequantize(planes, g.dtype), None, None


@register_storage("peftcore.GgufLinear")
class GgufWeight(LinearWeight):
    """`GgufLinear`. Its dense weight is float32, with the values of the `gguf` package."""

    product_takes_any_dtype = True  # type: ignore[assignment]
    quantized = True

    @property
    def backend(self) -> str | None:  # type: ignore[override]
        return f"gguf {self.layer.format_name}"

    @property
    def activation_dtype(self) -> torch.dtype | None:
        return self.layer.compute_dtype

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.layer.format.dequantize(self.stored(state).detach())

    def write(self, weight: Tensor) -> None:
        self.layer._parameters["weight"] = nn.Parameter(self._packed(weight), requires_grad=False)

    def _packed(self, weight: Tensor) -> Tensor:
        """Return the planes of a dense weight, by the quantiser of the `gguf` package."""
        require_extra("export", "merging into GGUF blocks", "gguf")
        import gguf
        import numpy as np
        from gguf.quants import quantize

        block: BlockFormat = self.layer.format
        values = weight.detach().float().cpu().contiguous().numpy()
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused below
                rows = torch.from_numpy(quantize(values, gguf.GGMLQuantizationType(block.number)))
        except NotImplementedError as error:
            raise MergeError(
                f"{block.name}: the gguf package has no quantiser for this type, so no merged weight can be stored in "
                "it; dequantise the model first (`model.dequantize()`), export the adapter beside its base "
                "(export_gguf_lora), or merge while exporting (export_gguf_merged)"
            ) from error
        planes = block.pack(rows).to(self.device)
        if not block.dequantize(planes).isfinite().all():
            raise MergeError(
                f"{block.name}: the merged weight has values that are not finite, or scales beyond half precision; "
                "check the adapter, or dequantise the model first (`model.dequantize()`)"
            )
        return planes

    def grid(self) -> Grid:
        return self.layer.format.grid(self.layer.weight)

    def write_codes(self, codes: Tensor) -> None:
        planes = self.layer.format.with_codes(self.layer.weight, codes)
        self.layer._parameters["weight"] = nn.Parameter(planes, requires_grad=False)

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        trains_bias = self.layer.bias is not None and self.layer.bias.requires_grad
        return None if trains_bias else _product_dtype(x)

    def product(self, x: Tensor) -> Tensor:
        bias = self.layer.bias
        return F.linear(x, self.layer.dequantized(x.dtype), None if bias is None else bias.to(x.dtype))

    def weight_for_backward(self) -> None:
        return None
