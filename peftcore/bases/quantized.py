"""Linear layers that bitsandbytes stores in 4 or 8 bits.

On CPUs with bfloat16 instructions, bitsandbytes has a second 4-bit matrix product that reads codes in a packed order.
For one or two tokens that product is several times faster than dequantising the weight; for a long prompt it is ten
times slower. A bitsandbytes layer repacks itself permanently at its first forward in eval mode. Layers with adapters,
and all layers of a model that trains, do not (`keep_codes`), so that saving, merging and training stay exact to the
bit. The view makes a packed copy of the codes for short inputs and drops the copy at the next long input.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.bases.grid import Grid
from peftcore.bases.plain import LinearWeight
from peftcore.bases.storages import register_storage
from peftcore.errors import TrainingError

MAX_PACKED_TOKENS = 32
"""Largest number of tokens for which the packed product is used.

Its time grows with the number of tokens; dequantisation takes nearly constant time. `benchmarks.quantised_forward`
finds them equal at 16 to 26 tokens of one layer in bfloat16 (192 x 576 to 1536 x 576). In a whole model on two cores
(`benchmarks.decoding`), 32 rows take 0.8 of the time by the packed product.
"""
PACKED_OUTPUTS = 32
"""Number of outputs whose codes are interleaved in the packed order."""
REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' name of a 4-bit layer's attribute that is true if the layer repacks itself."""


@register_storage("bitsandbytes.Params4bit")
class FourBitWeight(LinearWeight):
    """`bitsandbytes.nn.Linear4bit` (NF4, FP4), with or without double quantisation. QLoRA: arXiv:2305.14314."""

    quantized = True
    product_takes_any_dtype = True  # type: ignore[assignment]
    backend = "bnb 4bit"

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._packed: _PackedWeight | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def clear_cache(self) -> None:
        self._packed = None

    def prepare_layer(self) -> None:
        keep_codes([self.layer])

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.quant_state.dtype

    @property
    def activation_dtype(self) -> torch.dtype | None:
        return self.layer.compute_dtype

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        dtype = self.layer.compute_dtype
        if x.dtype != dtype or (self.layer.bias is not None and self.layer.bias.requires_grad):
            return None  # the layer would cast x to its compute dtype and the output back
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
        return None if autocast else dtype

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != self.layer.compute_dtype:
            return super().product(x)
        packed = self._packed = self._packed_for(x)
        if packed is None:
            return self.layer(x)
        codes, scales, _, state, _ = packed
        y = _packed_product()(x.contiguous(), codes, state.shape, scales, state.code, state.blocksize)
        return y if self.layer.bias is None else y.add_(self.layer.bias)

    def _weight(self) -> Tensor:
        return self.read()

    def plain_output(self, x: Tensor) -> Tensor | None:
        if x.dtype != self.layer.compute_dtype or torch._C._is_any_autocast_enabled():
            return super().plain_output(x)
        return self.product(x)

    def prefers_product(self, x: Tensor) -> bool:
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        return not wants_gradient and self.can_use_packed(x) and self.compute_dtype(x) is not None

    def _packed_for(self, x: Tensor) -> "_PackedWeight | None":
        """Return the current packed copy of the weight if the packed product fits x."""
        if not _is_short(x) or self.layer.training:
            return None
        weight = self.layer.weight
        if self._packed is not None and self._packed.is_current(weight):
            return self._packed
        return _packed(weight) if self.can_use_packed(x) else None

    def can_use_packed(self, x: Tensor) -> bool:
        """Return True for few bfloat16 tokens on the CPU; the packed product would round float32 inputs to bfloat16."""
        if not _is_short(x) or self.layer.training:
            return False
        state = self.layer.weight.quant_state
        has_whole_blocks = state.shape[0] % PACKED_OUTPUTS == 0 and state.shape[1] % state.blocksize == 0
        return has_whole_blocks and not _is_packed(state) and _has_packed_product()

    def weight_for_backward(self) -> None:
        return None

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(*_unpacked(self.stored(state)))

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Params4bit  # its stubs hide the constructor

        old = self.layer.weight
        parameter = make(
            weight.to(self.dtype).contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        self.restore({"weight": parameter.to(old.device)})

    def grid(self) -> Grid | None:
        _, state = _unpacked(self.layer.weight)
        if state.shape[1] % state.blocksize:
            return None  # bitsandbytes' CPU kernel takes wrong scales where a block spans two rows
        scales = _block_scales(state).float().repeat_interleave(state.blocksize)
        outputs, inputs = state.shape
        return Grid(state.code.float(), scales[: outputs * inputs].view(outputs, inputs), None, state.dtype)

    def write_codes(self, codes: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Params4bit

        old = self.layer.weight
        data, state = _unpacked(old)
        flat = nn.functional.pad(codes.flatten().to(torch.uint8), (0, codes.numel() % 2))
        packed = flat[::2] << 4 | flat[1::2]
        parameter = make(
            packed.view(data.dtype).view(data.shape),
            requires_grad=False,
            quant_state=state,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=old.module,
            bnb_quantized=True,
        )
        self.restore({"weight": parameter})

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.layer.quant_state = state["weight"].quant_state


class _PackedWeight(NamedTuple):
    """A 4-bit weight in the order of bitsandbytes' CPU kernel."""

    codes: Tensor
    """(o, i/2) bytes: for each group of 32 outputs, input pair by input pair; a byte holds outputs 16 apart."""
    scales: Tensor
    """(i/blocksize, o) in bfloat16."""
    memory: "weakref.ref[torch.UntypedStorage]"
    """Memory of the original codes; weak, because a strong reference could keep a merged weight alive for ever."""
    state: Any
    """Quantisation state of the original weight."""
    version: int
    """Version counter of the original weight."""

    def is_current(self, weight: Any) -> bool:
        """Return True if the copy was made from this weight and the weight has not changed since."""
        same_values = self.state is weight.quant_state and self.version == _version(weight)
        return same_values and self.memory() is weight.untyped_storage()


def _is_short(x: Tensor) -> bool:
    """Return True for bfloat16 inputs on the CPU that are short enough for the packed product."""
    return x.dtype == torch.bfloat16 and x.is_cpu and 0 < x.numel() <= MAX_PACKED_TOKENS * x.shape[-1]


def _packed(weight: Any) -> _PackedWeight:
    """Return a packed copy of a 4-bit weight."""
    state = weight.quant_state
    outputs, inputs = state.shape
    rows = weight.data.view(torch.uint8).view(-1, 2, PACKED_OUTPUTS // 2, inputs // 2)
    even, odd = rows >> 4, rows & 15
    halves = [half[:, 0] | half[:, 1] << 4 for half in (even, odd)]
    codes = torch.stack(halves, -1).transpose(1, 2).reshape(outputs, inputs // 2)
    scales = _block_scales(state).view(outputs, -1).T.to(torch.bfloat16).contiguous()
    return _PackedWeight(codes, scales, weakref.ref(weight.untyped_storage()), state, _version(weight))


def _block_scales(state: Any) -> Tensor:
    """Return the scale of each block of a 4-bit weight, dequantised if the scales are quantised too."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def _version(weight: Tensor) -> int:
    """Return autograd's count of in-place changes; 0 for an inference tensor, which has no count."""
    return 0 if weight.is_inference() else weight._version


@cache
def _packed_product() -> Any:
    return torch.ops.bitsandbytes.gemv_4bit.default


@cache
def _has_packed_product() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _is_packed(state: Any) -> bool:
    """Return True if bitsandbytes has packed the weight of this quantisation state in place."""
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Return codes and quantisation state in the usual order, as copies if bitsandbytes has packed the weight."""
    if not _is_packed(weight.quant_state):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    return _convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(weight.quant_state))


@register_storage("bitsandbytes.Int8Params", "bitsandbytes.Linear8bitLt")
class EightBitWeight(LinearWeight):
    """`bitsandbytes.nn.Linear8bitLt`: rows scaled to int8. LLM.int8(): arXiv:2208.07339."""

    quantized = True
    backend = "bnb 8bit"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def activation_dtype(self) -> torch.dtype | None:
        return getattr(self.layer, "compute_dtype", None)

    def compute_dtype(self, x: Tensor) -> torch.dtype | None:
        # the product rounds x to 8 bits, but the gradient is that of x Wᵀ + b
        trains_bias = self.layer.bias is not None and self.layer.bias.requires_grad
        return None if trains_bias or torch.is_autocast_enabled(x.device.type) else x.dtype

    def product(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def weight_for_backward(self) -> None:
        return None

    def read(self) -> Tensor:
        return self.read_from(self.state())

    def read_from(self, state: Mapping[str, Any]) -> Tensor:
        weight: Any = self.stored(state)
        scale = state["state"].SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scale.view(-1, 1) / 127)

    def write(self, weight: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Int8Params
        parameter = make(weight.to(torch.float16).contiguous(), requires_grad=False, has_fp16_weights=False)
        self.layer.state = copy.copy(self.layer.state)
        self.layer.state.CB = self.layer.state.SCB = None
        self.layer._parameters["weight"] = parameter.to(self.device)

    def grid(self) -> Grid:
        weight = self.layer.weight
        scale = self.layer.state.SCB if weight.SCB is None else weight.SCB
        levels = torch.arange(-127, 128, dtype=torch.float32, device=weight.device)
        scale = (scale.view(-1, 1) / 127).expand(weight.shape)
        return Grid(levels, scale, None, torch.float32)

    def write_codes(self, codes: Tensor) -> None:
        make: Any = import_module("bitsandbytes.nn").Int8Params
        scale = self.layer.state.SCB if self.layer.weight.SCB is None else self.layer.weight.SCB
        data = (codes.to(torch.int16) - 127).to(torch.int8)
        self.layer.state = copy.copy(self.layer.state)
        self.layer.state.CB = self.layer.state.SCB = None
        self.layer._parameters["weight"] = make(
            data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale.clone()
        )

    def state(self) -> dict[str, Any]:
        return {**super().state(), "state": self.layer.state}

    def move_state(self, state: dict[str, Any]) -> None:
        # like bitsandbytes' own `to`: these tensors are moved and never cast
        device, matmul_state = state["weight"].device, state["state"]
        for name in ("CB", "SCB"):
            if (tensor := getattr(matmul_state, name)) is not None:
                setattr(matmul_state, name, tensor.to(device))

    def restore(self, state: dict[str, Any]) -> None:
        super().restore({name: value for name, value in state.items() if name != "state"})
        self.layer.state = state["state"]


def keep_codes(modules: Iterable[nn.Module]) -> None:
    """Prevent bitsandbytes from repacking 4-bit layers for inference on the CPU.

    Few tokens take as long as with the repacking (`peftcore.bases.bitsandbytes_layers.linear4bit`).

    Args:
        modules: The layers, among others, which stay as they are; changed in place.
    """
    for module in modules:
        if REPACKS not in module.__dict__:
            continue
        setattr(module, REPACKS, False)
        bitsandbytes: Any = import_module("bitsandbytes.nn")
        on_cpu = module.weight.device.type == "cpu"
        # subclasses may have a forward of their own
        if type(module) is bitsandbytes.Linear4bit and on_cpu and _has_packed_product():
            module.__class__ = import_module("peftcore.bases.bitsandbytes_layers.linear4bit").Linear4bit


def keep_quantized_weights_trainable(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights for inference on the CPU.

    A new adapter that trains does so, too. Without it, the first evaluation during training repacks them. The packed
    form has no backward pass (layers below get no gradient, and bitsandbytes only warns) and rounds the blocks' scales.
    The repacking cannot be undone.

    Args:
        model: The model to train; changed in place.

    Raises:
        TrainingError: A layer of the model is already packed.
    """
    for path, module in model.named_modules():
        if REPACKS in module.__dict__ and _is_packed(getattr(getattr(module, "weight", None), "quant_state", None)):
            raise TrainingError(
                f"{path.removesuffix('.base_layer')}: a forward pass in eval mode has packed this 4-bit layer for "
                "inference, so it has no gradients; load the base model again and train before evaluating it"
            )
    keep_codes(model.modules())
