"""Linear layers of GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) checkpoints, as gptqmodel loads them.

Both store codes q, and for each group g of inputs a scale s and a zero point z: W = s_g (q − z_g). A merged weight is
rounded to the scales and zero points of the checkpoint; new ones would need the data of its calibration.

Shapes: o out_features, i in_features, c codes in one 32-bit word.
"""

import copy
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
    """A layer of gptqmodel's kernel in PyTorch: the only one that computes gradients and keeps its codes as they are."""

    kernel: ClassVar[str]
    """Class of the layer."""
    advice: ClassVar[str]
    """How the checkpoint is loaded with this kernel."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        if type(layer).__name__ != cls.kernel:
            return f"only gptqmodel's {cls.kernel} can; load the model with {cls.advice}"
        changes_inputs = any(getattr(layer, name, None) is not None for name in ("had_K", "adapter"))
        return "it rotates its input or has an adapter of gptqmodel's own" if changes_inputs else None

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.scales.dtype

    def codes(self, state: Mapping[str, Any]) -> Tensor:
        return state["weight"]

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        return self.dequantized(self._with_codes(state["weight"])).T.detach()

    @abstractmethod
    def dequantized(self, layer: Any) -> Tensor:
        """Return the dense weight (i, o) of a layer, in the dtype of its scales."""

    def write(self, weight: Tensor) -> None:
        largest = 2**self.layer.bits - 1
        bounds = [torch.full_like(weight.T, code, dtype=torch.int32) for code in (0, largest)]
        lowest, highest = (self.dequantized(self._with_codes(self.packed(codes))).float() for codes in bounds)
        codes = ((weight.T.float() - lowest) * largest / (highest - lowest)).round_().clamp_(0, largest)
        self.restore({"weight": self.packed(codes.to(torch.int32))})

    @abstractmethod
    def packed(self, codes: Tensor) -> Tensor:
        """Return codes (i, o) in the layer's form.

        Raises:
            MergeError: The layer's number of bits has another form.
        """

    def write_bias(self, bias: Tensor) -> None:
        self.restore({"bias": bias.detach().to(self.layer.bias)})

    def state(self) -> dict[str, Any]:
        return {"weight": self.layer.qweight, "bias": self.layer.bias}

    def move_state(self, state: dict[str, Any]) -> None:
        device = self.layer.qweight.device
        state.update({name: tensor.to(device) for name, tensor in state.items() if tensor is not None})

    def restore(self, state: dict[str, Any]) -> None:
        for name, attribute in (("weight", "qweight"), ("bias", "bias")):
            if name in state:
                setattr(self.layer, attribute, state[name])
        self.layer._clear_runtime_weight_cache()

    def _with_codes(self, codes: Tensor) -> Any:
        """Return a copy of the layer that shares all tensors except the codes."""
        layer = copy.copy(self.layer)
        vars(layer)["_buffers"] = {**layer._buffers, "qweight": codes}
        layer._clear_runtime_weight_cache()
        return layer


@register_storage("gptqmodel.GPTQQuantLinear")
class GptqWeight(_GptqmodelWeight):
    """`TorchLinear` of gptqmodel: a word holds the codes of c consecutive inputs."""

    backend = "gptq"
    kernel = "TorchLinear"
    advice = "quantization_config=GPTQConfig(bits=..., backend='gptq_torch')"

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point  # the weight is cast to the type of the input

    def dequantized(self, layer: Any) -> Tensor:
        return type(layer).dequantize_weight(layer)  # the layer's own attribute is compiled

    def packed(self, codes: Tensor) -> Tensor:
        bits = self.layer.bits
        if bits not in (2, 4, 8) or self.layer.planar or self.layer.pack_dtype != torch.int32:
            raise MergeError(
                f"GPTQ weights of {bits} bits in this form cannot be packed; call peftcore.dequantize_base(model) "
                "first, which makes plain layers, or keep the adapter unmerged"
            )
        count = 32 // bits
        rows = nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % count)).view(-1, count, codes.shape[1])
        words = torch.zeros_like(rows[:, 0])
        for index in range(count):
            words |= rows[:, index] << bits * index
        return words


@register_storage("gptqmodel.AWQuantLinear")
class AwqWeight(_GptqmodelWeight):
    """`AwqTorchLinear` of gptqmodel: a word holds the codes of c consecutive outputs in AWQ's order."""

    backend = "awq"
    kernel = "AwqTorchLinear"
    advice = "quantization_config=AwqConfig(backend='torch_awq')"

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float16, torch.bfloat16) and dtype == self.weight_dtype

    def dequantized(self, layer: Any) -> Tensor:
        unpack: Any = import_module("gptqmodel.quantization.awq.utils.packing_utils").dequantize_gemm
        return unpack(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)

    def packed(self, codes: Tensor) -> Tensor:
        pack: Any = import_module("gptqmodel.quantization.awq.utils.packing_utils").pack_awq
        return pack(codes, codes[:1], self.layer.bits)[0]
