"""`peft.utils.integrations`: the weights of quantised layers, and DeepSpeed's sharded parameters."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from peftcore.bases import base_weight
from peftcore.errors import ConfigError, require_extra
from peftcore.hf_peft.reexports import reexported

__all__ = [
    "check_deepspeed_zero3_enabled",
    "dequantize_bnb_weight",
    "dequantize_module_weight",
    "gather_params_ctx",
    "get_bnb_param_type",
    "init_empty_weights",
    "skip_init_on_device",
]

_REGISTER = nn.Module.register_parameter, nn.Module.register_buffer
"""PyTorch's own methods, which `init_empty_weights` replaces for its time."""


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer as it is stored, without quantisation; a plain layer's own parameter.

    Args:
        module: a layer. The linear layers of bitsandbytes, GPTQ, AWQ, HQQ and torchao give (out_features, in_features).

    Raises:
        TargetError: a layer without a weight, or of an unknown storage.
    """
    weight = getattr(module, "weight", None)
    if type(weight) is nn.Parameter:
        return weight
    return base_weight(module, type(module).__name__).read()


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """Return a weight of bitsandbytes (out_features, in_features) without quantisation.

    Args:
        weight: a `Params4bit` or an `Int8Params`.
        state: the layer's `state`, for an `Int8Params`; its `SCB` is the scale of each row.

    Raises:
        ConfigError: the weight is of another type, or its scales are not known.
    """
    bits = get_bnb_param_type(weight)
    scales: Any = getattr(state, "SCB", None)
    scales = getattr(weight, "SCB", None) if scales is None else scales
    if not bits or (bits == "8bit" and scales is None):
        raise ConfigError(
            f"dequantize_bnb_weight takes a weight of bitsandbytes, of 8 bits with its layer's state; got "
            f"{type(weight).__name__}; try dequantize_module_weight(layer)"
        )
    import bitsandbytes.functional as bnb  # here, because the package is optional

    if bits == "4bit":
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    return bnb.int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Return how bitsandbytes stores a parameter; False if it is not one of its own."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def check_deepspeed_zero3_enabled() -> bool:
    """Return True if transformers runs under DeepSpeed ZeRO-3, which divides parameters among processes."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # here, because it imports much

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Make parameters whole inside of the context under DeepSpeed ZeRO-3; otherwise do nothing.

    Args:
        param: one parameter or several.
        modifier_rank: process whose changes are sent to the others; None: changes are lost.
        fwd_module: module that gets the parameters.
    """
    if not check_deepspeed_zero3_enabled():
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")  # installed wherever ZeRO-3 runs
    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Make modules inside of the context on the meta device, which has no memory.

    Args:
        include_buffers: True for their buffers, too.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    require_extra("train", "init_empty_weights", "accelerate")
    with importlib.import_module("accelerate").init_empty_weights(include_buffers=include_buffers):
        yield


@contextlib.contextmanager
def _skip_init_on_device() -> Iterator[None]:
    """Make modules inside of the context with memory, also inside of `init_empty_weights(include_buffers=False)`."""
    patched = nn.Module.register_parameter, nn.Module.register_buffer
    nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = patched  # type: ignore[assignment]


_F = TypeVar("_F", bound=Callable[..., Any])


def skip_init_on_device(func: _F) -> _F:
    """Return a function that makes modules with memory, also inside of `init_empty_weights` without buffers.

    Args:
        func: the function.
    """

    @functools.wraps(func)
    def with_memory(*args: Any, **kwargs: Any) -> Any:
        with _skip_init_on_device():
            return func(*args, **kwargs)

    return cast(_F, with_memory)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
