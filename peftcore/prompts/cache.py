"""Access to a model's key/value cache: its argument name, length, capacity and layer shapes."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, EncoderDecoderCache, StaticLayer

from peftcore.detection import detect
from peftcore.errors import ConfigError
from peftcore.prompts.learner import is_encoder_decoder

_NAMES = ("cache", "past_key_values")
"""Names of the cache argument: in transformers 5.24 and later, and before."""


def cache_name(model: nn.Module) -> str | None:
    """Return the name of the model's cache argument; None if the model accepts no cache."""
    parameters = inspect.signature(model.forward).parameters
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    backbone = model._modules.get(getattr(model, "base_model_prefix", "")) if accepts_any else None
    inner = inspect.signature(backbone.forward).parameters if isinstance(backbone, nn.Module) else {}
    return next((name for names in (parameters, inner) for name in _NAMES if name in names), None)


def cache_of(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return the call's cache, or None; in `inputs` it is renamed to the model's argument name."""
    caches = [inputs.pop(name) for name in _NAMES if name in inputs]
    cache = next((cache for cache in caches if cache is not None), None)
    if cache is not None:
        inputs[cache_name(model) or _NAMES[0]] = cache
    return cache


def has_length(cache: Any) -> bool:
    """Return False for a cache of recurrent states only (Mamba), which does not count its tokens."""
    layers = getattr(cache, "layers", ())
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def is_empty(cache: Any) -> bool:
    """Return True if there is no cache or the cache is empty, so that this call is the first of its text."""
    if cache is None:
        return True
    return bool(cache.get_seq_length() == 0) if has_length(cache) else not cache.has_previous_state()


def has_states(inputs: dict[str, Any], cache: Any) -> bool:
    """Return True if a call goes on from recurrent states that do not count their tokens.

    Args:
        inputs: The call's arguments by name; RWKV's states are in "state".
        cache: The call's cache, or None.
    """
    return inputs.get("state") is not None or not (has_length(cache) or is_empty(cache))


def lacks_prompt(mask: Tensor, cache: Any, new: int) -> bool:
    """Return True if the mask of a later call does not cover the prompt.

    Args:
        mask: The mask (B, ·).
        cache: The cache, which contains the prompt; None for a model that keeps its states elsewhere.
        new: Number of tokens of this call.
    """
    if cache is None or not has_length(cache):
        return False  # a mask of the new tokens only
    past = cache.get_seq_length()
    return not isinstance(past, int) or mask.shape[1] < past + new  # a tensor (static cache) is not read: no GPU sync


def make_room(cache: Any, count: int, tokens: int) -> None:
    """Enlarge a cache of fixed size by the length of the prompt.

    Args:
        cache: A cache of any class; only static layers are changed.
        count: Number of entries of the prompt.
        tokens: Number of entries that the call adds, prompt included.

    Raises:
        ConfigError: The cache's memory is already allocated and too small.
    """
    self_attention = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(self_attention, "layers", ()):
        if not isinstance(layer, StaticLayer):
            continue
        if not layer.is_initialized:
            layer.max_cache_len += count
        elif not layer.is_sliding and layer.max_cache_len < tokens:
            raise ConfigError(
                f"the static cache has room for {layer.max_cache_len} tokens and this call needs {tokens}, {count} of "
                f"them for the prompt; create the cache with max_cache_len larger by {count}"
            )


def decoder_config(model: nn.Module) -> Any:
    """Return the configuration of the model or, for encoder-decoders, of the decoder, to which the cache belongs."""
    owner: Any = model
    return (owner.get_decoder() if is_encoder_decoder(model) else owner).config.get_text_config(decoder=True)


def wants_cache(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Return True if a call keeps keys and values in a cache."""
    use_cache = inputs.get("use_cache")
    return bool(getattr(decoder_config(model), "use_cache", False) if use_cache is None else use_cache)


def kv_shapes(model: nn.Module) -> list[tuple[int, int] | None]:
    """Return (number of key/value heads, their width) of each layer.

    Returns:
        One entry for each layer, None for a layer without its own keys and values; [] if the model has no such layers.

    Raises:
        ConfigError: Keys and values have different widths.
    """
    geometry = detect(model).prefix
    layers = geometry.layers if geometry else ()
    if any(layer and layer.head_dim != layer.value_dim for layer in layers):
        raise ConfigError(
            "prefix tuning does not support latent attention, whose cache has no heads; use PromptTuningConfig"
        )
    return [layer and (layer.kv_heads, layer.head_dim) for layer in layers]


def new_cache(model: nn.Module) -> Any:
    """Return an empty cache of variable length."""
    config = decoder_config(model)
    if is_encoder_decoder(model):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def layer_devices(model: nn.Module, count: int, default: torch.device) -> list[torch.device]:
    """Return the device of each layer's keys and values; a dispatched model has several devices."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not blocks or len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        return [default] * count
    return [next(block.parameters()).device for block in blocks[-1]]
