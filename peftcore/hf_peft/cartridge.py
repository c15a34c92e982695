"""HF PEFT's functions for prefixes of keys and values: a start from a text or a cache, and several joined into one."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftcore.config import PeftConfig
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import (
    CONFIG_NAME,
    MANIFEST,
    PROMPT_STATE,
    WEIGHTS_NAME,
    files_written_together,
    manifest_text,
    sha256,
)
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.training_flags import training_flags_restored
from peftcore.prompts.cache import cache_name
from peftcore.prompts.cartridge import CartridgeConfig
from peftcore.prompts.key_value_prefix import KeyValuePrefix
from peftcore.prompts.learner import EMBEDDINGS, is_encoder_decoder
from peftcore.storage.reading import load_peft_weights

_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
"""Options in which adapters must agree to be joined."""


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Return the first entries of a cache in the layout of a saved prefix.

    Args:
        past_key_values: A cache of one row, or a list of (keys, values) by layer, each (1, k, T, w).
        num_virtual_tokens: Number of entries n.

    Returns:
        Keys and values (n, 2·L·k·w), layer by layer, key before value.

    Raises:
        ConfigError: The cache is empty or has several rows, fewer than n entries, or layers of different shapes.
    """
    states = [state for layer in _layers(past_key_values) for state in layer]
    if not states:
        raise ConfigError("past_key_values is empty; give the cache of a call with use_cache=True")
    shapes = sorted({(state.shape[0], state.shape[1], state.shape[3]) for state in states if state.dim() == 4})
    if any(state.dim() != 4 for state in states) or len(shapes) > 1 or shapes[0][0] != 1:
        raise ConfigError(
            "past_key_values must hold keys and values of one row and one shape, (1, heads, tokens, width) in each "
            f"layer; got {sorted({tuple(state.shape) for state in states})}"
        )
    if (fewest := min(state.shape[2] for state in states)) < num_virtual_tokens:
        raise ConfigError(
            f"a prefix of {num_virtual_tokens} tokens needs as many entries in the cache; it has {fewest}; give a "
            "longer text, or fewer num_virtual_tokens"
        )
    return torch.stack([state[0, :, :num_virtual_tokens].transpose(0, 1) for state in states], 1).flatten(1)


def initialize_kv_prefix_from_past_key_values(
    model: Any,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Write the first entries of a cache into the prefix of an adapter, and return them.

    Args:
        model: The model with the adapter, of CARTRIDGE or of PREFIX_TUNING without projection.
        adapter_name: The adapter; None for the active one.
        past_key_values: As in `prompt_embeddings_from_past_key_values`, of the model without adapters.
        num_virtual_tokens: Number of entries; None for all of the prefix.

    Returns:
        Keys and values (n, 2·L·k·w).

    Raises:
        ConfigError: The adapter has no such prefix, or the cache does not fit it.
    """
    prefix = _prefix(model, adapter_name)
    count = prefix.count if num_virtual_tokens is None else num_virtual_tokens
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count).detach()
    prefix.load_prompt_embeddings(values)
    return values


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Write the keys and values of a text's first tokens into the prefix of an adapter, and return them.

    Only the first n tokens are computed, because keys and values do not depend on later tokens.

    Args:
        model: The model with the adapter, of CARTRIDGE or of PREFIX_TUNING without projection.
        tokenizer: The model's tokenizer.
        text: A text of at least n tokens.
        adapter_name: The adapter; None for the active one.
        num_virtual_tokens: n; None for all of the prefix.
        use_chat_template: True puts the text into a system message, if the tokenizer has a chat template.
        max_length: Tokens of the text that are used at most; None for no limit.

    Returns:
        Keys and values (n, 2·L·k·w).

    Raises:
        ConfigError: The adapter has no such prefix, the text is too short, or the model is an encoder-decoder.
    """
    prefix = _prefix(model, adapter_name)
    if is_encoder_decoder(model) or not prefix.is_causal:
        raise ConfigError(
            f"initialize_kv_prefix_from_text needs a decoder that reads tokens in order; {type(model).__name__} is none"
        )
    count = prefix.count if num_virtual_tokens is None else num_virtual_tokens
    ids = _token_ids(tokenizer, text, use_chat_template, max_length)
    if ids.shape[1] < count:
        raise ConfigError(f"the text has {ids.shape[1]} tokens, and the prefix {count}; give a longer text")
    ids = ids[:, :count].to(model.device)
    with training_flags_restored(model), model.disable_adapter():
        model.eval()  # dropout would change the keys and values
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    name = cache_name(model)
    assert name is not None
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=outputs[name], num_virtual_tokens=count
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Join saved adapters of CARTRIDGE into one, whose prefix has the tokens of all in order.

    The frozen tokens of the first adapter stay frozen.

    Args:
        adapter_paths: Directories of at least two adapters of one model.
        output_path: Directory to write; an adapter in it is replaced.
        safe_serialization: Only True, because pickles are never written.

    Raises:
        ConfigError: An adapter is of another method, or the adapters do not fit each other.
        CheckpointError: A directory cannot be read, or `output_path` is a file.
    """
    if not safe_serialization:
        raise ConfigError("safe_serialization must be True, because pickles are never written; leave it out")
    if len(adapter_paths) < 2:
        raise ConfigError(f"compose_cartridge_adapters joins at least two adapters; got {len(adapter_paths)}")
    directory = Path(output_path)
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give a directory to save the adapter in")
    configs = [_cartridge_config(path) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs, strict=True):
        for name in _SAME:
            if (other := getattr(config, name)) != (first := getattr(configs[0], name)):
                raise ConfigError(f"{path} has {name}={other!r}, and {adapter_paths[0]} has {first!r}; join others")
    joined = torch.cat([load_peft_weights(str(path), device="cpu")[EMBEDDINGS] for path in adapter_paths])
    config = dataclasses.replace(configs[0], num_virtual_tokens=len(joined))
    with files_written_together(directory, owned=[PROMPT_STATE]) as fresh:
        save_file({EMBEDDINGS: joined}, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        (fresh / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        (fresh / MANIFEST).write_text(
            manifest_text({file.name: sha256(file) for file in sorted(fresh.iterdir())}), encoding="utf-8"
        )


def _cartridge_config(path: str | os.PathLike[str]) -> CartridgeConfig:
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, CartridgeConfig):
        raise ConfigError(f"{path} holds an adapter of {config.method}; only those of CARTRIDGE can be joined")
    return config


def _prefix(model: Any, name: str | None) -> KeyValuePrefix:
    """Return the prefix of an adapter; None for the active one."""
    adapters = adapter_set(model)
    name = str(model.active_adapter) if name is None else name
    adapters.require(name)
    prefix = adapters.prompt(name)
    if not isinstance(prefix, KeyValuePrefix):
        raise ConfigError(
            f"adapter {name!r} is of {adapters.configs[name].method}, which has no prefix of keys and values; name "
            "one of CARTRIDGE or PREFIX_TUNING"
        )
    return prefix


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return (keys, values) of each layer, of a cache of any class or a list."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    pairs = [(layer.keys, layer.values) for layer in layers] if layers is not None else [tuple(p)[:2] for p in cache]
    for number, pair in enumerate(pairs):
        if not all(isinstance(state, Tensor) for state in pair):
            raise ConfigError(
                f"layer {number} of past_key_values has no keys and values, so no prefix can start at it; give the "
                "cache of a model whose layers all have attention"
            )
    return pairs


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """Return the token ids (1, T) of a text, in a system message if the tokenizer has a chat template."""
    has_template = hasattr(tokenizer, "apply_chat_template") and getattr(tokenizer, "chat_template", "") is not None
    if use_chat_template and has_template:
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, tokenize=True, add_generation_prompt=False, return_dict=False, return_tensors="pt"
        )
        return ids[:, :max_length]
    return tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]
