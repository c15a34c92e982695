"""The model's key/value cache as prompts meet it: its name, what is in it, room in it, the shapes of its layers."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticLayer

from peftcore.detection import detect
from peftcore.errors import ConfigError
from peftcore.prompts.learner import is_encoder_decoder

_NAMES = ("cache", "past_key_values")
"""What transformers calls it, and what it and older model code called it before 5.24."""


def cache_name(model: nn.Module) -> str | None:
    """The argument that gives the model its cache; None for a model that takes none."""
    parameters = inspect.signature(model.forward).parameters
    open_to_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    backbone = getattr(model, "base_model", None) if open_to_more else None
    inner = inspect.signature(backbone.forward).parameters if isinstance(backbone, nn.Module) else {}
    return next((name for names in (parameters, inner) for name in _NAMES if name in names), None)


def cache_of(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The call's cache, put under the name that the model knows; None when there is none."""
    given = [inputs.pop(name) for name in _NAMES if name in inputs]
    cache = next((cache for cache in given if cache is not None), None)
    if cache is not None:
        inputs[cache_name(model) or _NAMES[0]] = cache
    return cache


def is_empty(cache: Any) -> bool:
    """Whether nothing has been read yet, so that this call is the first of its text."""
    return cache is None or bool(cache.get_seq_length() == 0)


def lacks_prompt(mask: Tensor, cache: Any, new: int) -> bool:
    """Whether a mask (B, ·) of a later call counts the text alone; `new`: tokens of this call."""
    past = cache.get_seq_length()
    return not isinstance(past, int) or mask.shape[1] < past + new  # a static cache's tensor is not waited for


def make_room(cache: Any, count: int, tokens: int) -> None:
    """Let a cache of fixed size hold `count` entries more than it was made for.

    tokens: what it is about to take, these included. Raises ConfigError if its memory is there and too small.
    """
    own = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(own, "layers", ()):
        if not isinstance(layer, StaticLayer):
            continue
        if not layer.is_initialized:
            layer.max_cache_len += count
        elif not layer.is_sliding and layer.max_cache_len < tokens:
            raise ConfigError(
                f"the static cache holds {layer.max_cache_len} tokens and this call needs {tokens}, {count} of them "
                f"for the prompt; make it with max_cache_len larger by {count}"
            )


def decoder_config(model: nn.Module) -> Any:
    """The configuration of the part that keeps a cache."""
    owner: Any = model
    return (owner.get_decoder() if is_encoder_decoder(model) else owner).config.get_text_config(decoder=True)


def kv_shapes(model: nn.Module) -> list[tuple[int, int] | None]:
    """(key/value heads, their width) of each layer; None for one that keeps none of its own. [] for no such layer.

    Raises ConfigError where keys and values have other widths.
    """
    geometry = detect(model).prefix
    layers = geometry.layers if geometry else ()
    if any(layer and layer.head_dim != layer.value_dim for layer in layers):
        raise ConfigError(
            "prefix tuning does not fit latent attention, whose cache holds no heads; use PromptTuningConfig"
        )
    return [layer and (layer.kv_heads, layer.head_dim) for layer in layers]


def new_cache(model: nn.Module) -> Any:
    """An empty cache that grows."""
    config = decoder_config(model)
    if is_encoder_decoder(model):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def layer_devices(model: nn.Module, count: int, default: torch.device) -> list[torch.device]:
    """Where each layer's keys and values live; layers of a dispatched model are on several devices."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not blocks or len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        return [default] * count
    return [next(block.parameters()).device for block in blocks[-1]]
