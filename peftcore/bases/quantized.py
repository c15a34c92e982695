"""Base layers that bitsandbytes keeps in 4 or 8 bits; linear maps like any other once their weight is read."""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.plain import LinearWeight
from peftcore.errors import TrainingError


class FourBitWeight(LinearWeight):
    """`bitsandbytes.nn.Linear4bit` (NF4, FP4), with or without double quantisation. QLoRA: arXiv:2305.14314."""

    quantized = True

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.quant_state.dtype

    def computes_in(self, x: Tensor) -> torch.dtype | None:
        dtype = self.layer.compute_dtype
        if x.dtype != dtype or (self.layer.bias is not None and self.layer.bias.requires_grad):
            return None  # the layer casts x there and back, and adapters act on x as it is
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
        return None if autocast else dtype

    def product(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def weight_to_keep(self) -> None:
        return None

    def read(self) -> Tensor:
        import bitsandbytes.functional as bnb

        data, state = _unpacked(self.layer.weight)
        return bnb.dequantize_4bit(data, state)

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Params4bit  # its stubs hide the constructor

        old = self.layer.weight
        fresh = make(
            weight.to(self.dtype).contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        self.restore({"weight": fresh.to(old.device)})

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.layer.quant_state = state["weight"].quant_state


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Undo, in a copy, the repacking that an eval forward on the CPU leaves behind; dequantising needs rows."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    return _convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(weight.quant_state))


class EightBitWeight(LinearWeight):
    """`bitsandbytes.nn.Linear8bitLt`: rows scaled to int8. LLM.int8(): arXiv:2208.07339."""

    quantized = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def computes_in(self, x: Tensor) -> torch.dtype | None:
        """Its product rounds x to 8 bits; the gradient takes no notice of that."""
        learns = self.layer.bias is not None and self.layer.bias.requires_grad
        return None if learns or torch.is_autocast_enabled(x.device.type) else x.dtype

    def product(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def weight_to_keep(self) -> None:
        return None

    def _codes(self) -> tuple[Tensor, Tensor]:
        weight, state = self.layer.weight, self.layer.state
        return weight.data, weight.SCB if weight.SCB is not None else state.SCB

    def read(self) -> Tensor:
        codes, scale = self._codes()
        return codes.float() * (scale.view(-1, 1) / 127)

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Int8Params
        fresh = make(weight.to(torch.float16).contiguous(), requires_grad=False, has_fp16_weights=False)
        self.layer.state = copy.copy(self.layer.state)
        self.layer.state.CB = self.layer.state.SCB = None
        self.layer._parameters["weight"] = fresh.to(self.device)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "state": self.layer.state}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore({name: value for name, value in state.items() if name != "state"})
        self.layer.state = state["state"]


def keep_quantized_weights_trainable(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for inference on the CPU, which an evaluation would do.

    The packed form has no backward pass (layers below get no gradient through it, with a warning only) and rounds
    the blocks' scales, and nothing packs them back. Raises TrainingError for a model that is packed already.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # pyright: ignore
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise TrainingError(
                f"{path} has been packed for inference by a forward pass in eval mode and gives no gradients any "
                "more; load the base model again and train before evaluating it"
            )
