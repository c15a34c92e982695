"""Linear layers of GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) checkpoints, as gptqmodel loads them.

Both store codes q, and for each group g of inputs a scale s and a zero point z: W = s_g (q − z_g).

Shapes: o out_features, i in_features.
"""

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.bases.quantized_linear import QuantizedLinear
from peftcore.bases.storages import register_storage
from peftcore.errors import MergeError


class _GptqmodelWeight(QuantizedLinear):
    """A layer of gptqmodel's kernel in PyTorch, which computes gradients and keeps its codes as they are."""

    layer_name: ClassVar[str]
    """Class of the layer."""
    format: ClassVar[str]
    """Name of the quantisation."""
    advice: ClassVar[str]
    """How the checkpoint is loaded with this kernel."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if type(layer).__name__ != cls.layer_name:
            return f"only gptqmodel's {cls.layer_name} can; load the model with {cls.advice}"
        changes_inputs = any(getattr(layer, name, None) is not None for name in ("had_K", "adapter"))
        return "it rotates its input or has an adapter of gptqmodel's own" if changes_inputs else None

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.scales.dtype

    def codes(self, state: Mapping[str, Any]) -> Tensor:
        return state["weight"]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.dequantized().T.detach()  # no state has other codes, because none are written

    @abstractmethod
    def dequantized(self) -> Tensor:
        """Return the dense weight (i, o) in the dtype of the scales."""

    def check_writable(self) -> None:
        raise MergeError(
            f"a weight cannot be merged into {self.layer_name}, because {self.format} needs data to choose "
            "codes, and without data the change of an adapter is mostly rounded away; call "
            "peftcore.dequantize_base(model) first, which makes plain layers, or keep the adapter unmerged"
        )

    def write(self, weight: Tensor) -> None:
        self.check_writable()

    def state(self) -> dict[str, Any]:
        return {"weight": self.layer.qweight, "bias": self.layer.bias}

    def write_bias(self, bias: Tensor) -> None:
        self.layer.bias = bias.detach().to(self.layer.bias)

    def move_state(self, state: dict[str, Any]) -> None:
        device = self.layer.qweight.device
        state.update({name: tensor.to(device) for name, tensor in state.items() if tensor is not None})

    def restore(self, state: dict[str, Any]) -> None:
        for name, attribute in (("weight", "qweight"), ("bias", "bias")):
            if name in state:
                setattr(self.layer, attribute, state[name])


@register_storage("gptqmodel.GPTQQuantLinear")
class GptqWeight(_GptqmodelWeight):
    """`TorchLinear` of gptqmodel."""

    backend, format = "gptq", "GPTQ"
    layer_name = "TorchLinear"
    advice = "quantization_config=GPTQConfig(bits=..., backend='gptq_torch')"

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point  # the weight is cast to the type of the input

    def dequantized(self) -> Tensor:
        return type(self.layer).dequantize_weight(self.layer)  # the layer's own attribute is compiled


@register_storage("gptqmodel.AWQuantLinear")
class AwqWeight(_GptqmodelWeight):
    """`AwqTorchLinear` of gptqmodel."""

    backend, format = "awq", "AWQ"
    layer_name = "AwqTorchLinear"
    advice = "quantization_config=AwqConfig(backend='torch_awq')"

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float16, torch.bfloat16) and dtype == self.weight_dtype

    def dequantized(self) -> Tensor:
        layer = self.layer
        unpack: Any = import_module("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
        return unpack(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
