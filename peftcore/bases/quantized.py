"""Base layers that bitsandbytes keeps in 4 or 8 bits; linear maps like any other once their weight is read.

On CPUs with bfloat16 instructions bitsandbytes has a second product for 4 bits, over codes in an order of its own: for
a token or two several times faster than dequantising the weight, for a prompt ten times slower. Its layers change
over to that order in place, for good, at their first forward in eval mode. Here the layer keeps its own order, so that
saving, merging and training stay exact to the bit, and a copy in the other order exists only while it pays.
"""

import copy
import weakref
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.bases.plain import LinearWeight
from peftcore.errors import TrainingError

FEW_TOKENS = 16
"""Tokens of a forward up to which the packed product is the faster one, as `benchmarks.quantised_forward` measured it.

Its time grows with the tokens, that of dequantising hardly does: in bf16 they met at 16 to 26 tokens for layers of
192 x 576 to 1536 x 576.
"""
PACKED_OUTPUTS = 32
"""Outputs whose codes the packed order keeps side by side."""


class FourBitWeight(LinearWeight):
    """`bitsandbytes.nn.Linear4bit` (NF4, FP4), with or without double quantisation. QLoRA: arXiv:2305.14314."""

    quantized = True

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.layer.support_avx512bf16_for_cpu = False  # else it repacks itself for good, as said above
        self._packed: _Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forget(self) -> None:
        self._packed = None

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
        if not self._is_for_packed(x, len(x)):
            self._packed = None
            return self.layer(x)
        weight = self.layer.weight
        if self._packed is None or not self._packed.is_of(weight):
            self._packed = _packed(weight)
        codes, scales, *_ = self._packed
        state = weight.quant_state
        product: Any = torch.ops.bitsandbytes.gemv_4bit.default
        y = product(x.contiguous(), codes, state.shape, scales, state.code, state.blocksize)
        return y if self.layer.bias is None else y.add_(self.layer.bias)

    def prefers_product(self, x: Tensor) -> bool:
        rows = x.numel() // x.shape[-1]
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        return not wants_gradient and self._is_for_packed(x, rows) and self.computes_in(x) is not None

    def _is_for_packed(self, x: Tensor, rows: int) -> bool:
        """Only in bfloat16, which is what the packed product computes in; float32 keeps its precision."""
        if self.layer.training or not 0 < rows <= FEW_TOKENS or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return False
        state = self.layer.weight.quant_state
        whole = state.shape[0] % PACKED_OUTPUTS == 0 and state.shape[1] % state.blocksize == 0
        return whole and not _is_packed(state) and _has_packed_product()

    def weight_to_keep(self) -> None:
        return None

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(*_unpacked(self.stored(state)))

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


class _Packed(NamedTuple):
    """A 4-bit weight in the order of bitsandbytes' CPU kernel."""

    codes: Tensor
    """(o, i/2) bytes: of 32 outputs the first input pair, the second, ...; a byte's halves are 16 outputs apart."""
    scales: Tensor
    """(i/blocksize, o) in bfloat16."""
    memory: "weakref.ref[torch.UntypedStorage]"
    """Of the codes that it was made of; a reference that would keep it alive could hold a merged weight for ever."""
    state: Any
    """The scales that it was made of."""
    version: int

    def is_of(self, weight: Any) -> bool:
        """Whether it was made of this weight as it is now."""
        same = self.memory() is weight.untyped_storage() and self.state is weight.quant_state
        return same and self.version == _version(weight)


def _packed(weight: Any) -> _Packed:
    import bitsandbytes.functional as bnb

    state = weight.quant_state
    outputs, inputs = state.shape
    rows = weight.data.view(torch.uint8).view(-1, 2, PACKED_OUTPUTS // 2, inputs // 2)
    even, odd = rows >> 4, rows & 15
    halves = [half[:, 0] | half[:, 1] << 4 for half in (even, odd)]
    codes = torch.stack(halves, -1).transpose(1, 2).reshape(outputs, inputs // 2)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    scales = scales.view(outputs, -1).T.to(torch.bfloat16).contiguous()
    return _Packed(codes, scales, weakref.ref(weight.untyped_storage()), state, _version(weight))


def _version(weight: Tensor) -> int:
    """How often the codes have been changed in place, as far as autograd has seen it."""
    return 0 if weight.is_inference() else weight._version


@cache
def _has_packed_product() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _is_packed(state: Any) -> bool:
    """Whether bitsandbytes has packed a layer in place."""
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Undo, in a copy, the repacking that an eval forward before there were adapters leaves behind."""
    if not _is_packed(weight.quant_state):
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

    def read(self) -> Tensor:
        return self.read_from(self.state())

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        weight: Any = self.stored(state)
        scale = state["state"].SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scale.view(-1, 1) / 127)

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Int8Params
        fresh = make(weight.to(torch.float16).contiguous(), requires_grad=False, has_fp16_weights=False)
        self.layer.state = copy.copy(self.layer.state)
        self.layer.state.CB = self.layer.state.SCB = None
        self.layer._parameters["weight"] = fresh.to(self.device)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "state": self.layer.state}

    def follow(self, state: dict[str, Any]) -> None:
        # bitsandbytes moves these where a layer's own `to` is called, and never casts them
        device, kept = state["weight"].device, state["state"]
        for name in ("CB", "SCB"):
            if (tensor := getattr(kept, name)) is not None:
                setattr(kept, name, tensor.to(device))

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
        if _is_packed(state):
            raise TrainingError(
                f"{path} has been packed for inference by a forward pass in eval mode and gives no gradients any "
                "more; load the base model again and train before evaluating it"
            )
