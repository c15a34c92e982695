"""A prefix of keys and values: n entries in the cache of each attention, softmax(q [K_P; K]ᵀ) [V_P; V].

The prefix is written into the cache before the first call of a text; in encoder-decoder models into the decoder's
cache. The checkpoint has (n, 2·L·k·w), layer by layer, key before value. Shapes: L layers, k key/value heads of width
w, B rows, T text tokens.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from peftcore._util.per_thread import PerThread
from peftcore.errors import ConfigError, TrainingError
from peftcore.prompts.cache import (
    cache_name,
    cache_of,
    is_empty,
    kv_shapes,
    lacks_prompt,
    layer_devices,
    make_room,
    new_cache,
    wants_cache,
)
from peftcore.prompts.learner import EMBEDDINGS, PromptLearner, accepts, is_causal, is_encoder_decoder, model_sizes
from peftcore.prompts.placement import Placement, check_not_packed, mask_of, text_positions, tokens_of


class KeyValuePrefix(PromptLearner):
    """A learned prefix of the keys and values of every layer."""

    _drops_cache = PerThread(False)
    """True if this call's cache was created for the prefix only and is removed from the outputs."""

    def __init__(self, config: Any, model: nn.Module):
        super().__init__(config, model)
        self.count: int = config.num_virtual_tokens
        self.heads: int = config.num_attention_heads
        self.width = config.token_dim // self.heads
        self.size = config.num_layers * 2 * config.token_dim
        """Numbers of one token's keys and values in all layers (count)."""
        self.shapes = kv_shapes(model)
        self.is_causal = is_encoder_decoder(model) or is_causal(model)
        self.counts_text = is_causal(model) and accepts(model, "position_ids")

    @classmethod
    def completed(cls, config: Any, model: nn.Module) -> Any:
        if not hasattr(model, "config") or cache_name(model) is None:
            raise ConfigError(
                f"{type(model).__name__} accepts no cache, which {config.method} needs; use PromptTuningConfig"
            )
        if _checkpoints(model):
            raise ConfigError(_checkpointing(config))
        shapes = [shape for shape in kv_shapes(model) if shape is not None]
        if not shapes:
            raise ConfigError("no layer of this model caches keys and values; use PromptTuningConfig")
        heads, width = max(shapes, key=lambda shape: shape[1])
        if any(shape[0] > heads for shape in shapes):
            raise ConfigError(
                f"one prefix cannot fit these key/value shapes (heads, width): {sorted(set(shapes))}; use "
                "PromptTuningConfig"
            )
        sizes = {"token_dim": heads * width, "num_attention_heads": heads, "num_layers": len(kv_shapes(model))}
        return dataclasses.replace(config, **{**model_sizes(config, model), **sizes})

    # -- forward ---------------------------------------------------------------------------------------------

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if model.training and _checkpoints(model):
            raise TrainingError(_checkpointing(self.config))
        side = "decoder_" if is_encoder_decoder(model) else ""
        mask, positions = mask_of(inputs, f"{side}attention_mask"), inputs.get(f"{side}position_ids")
        cache = cache_of(model, inputs)
        tokens = tokens_read(inputs, side)
        filler_count = self.filler_count(len(tokens))
        self._drops_cache = False
        if is_empty(cache):
            check_not_packed(inputs)
            name = cache_name(model)
            assert name is not None
            inputs[name] = self._fill(model, new_cache(model) if cache is None else cache, tokens)
            self._drops_cache = cache is None and not wants_cache(model, inputs)
            if positions is None and self.counts_text and mask is not None and bool((mask[:, 0] == 0).any()):
                positions = self.first_positions(mask)
            elif positions is None and self.counts_text and filler_count is not None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
            if mask is None and not self.is_causal:  # an encoder takes the number of keys from its mask
                mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        elif mask is not None and not lacks_prompt(mask, cache, tokens.shape[1]):
            mask = None  # the caller's mask covers the prefix
        if mask is not None:
            inputs[f"{side}attention_mask"] = Placement(self.count, None, filler_count).extend(mask, 1)
        if positions is not None:
            inputs[f"{side}position_ids"] = positions + (
                self.count if filler_count is None else self.count - filler_count
            )

    def _fill(self, model: nn.Module, cache: Any, tokens: Tensor) -> Any:
        """Write the prefix into an empty cache, for each row of the call, and return the cache."""
        make_room(cache, self.count, self.count + tokens.shape[1])
        self_attention: Cache = getattr(cache, "self_attention_cache", cache)
        devices = layer_devices(model, len(self.shapes), tokens.device)
        dtype = torch.get_autocast_dtype(tokens.device.type) if torch.is_autocast_enabled(tokens.device.type) else None
        dtype = dtype or getattr(model, "dtype", self.vectors.dtype)
        states = self.states(len(tokens)).to(dtype)
        for layer, (shape, device) in enumerate(zip(self.shapes, devices, strict=True)):
            if shape is not None:
                key, value = states[2 * layer], states[2 * layer + 1]
                heads, width = shape
                key, value = (each[:, :heads, :, :width].to(device) for each in (key, value))
                self_attention.update(key, value, layer)
        return cache

    def for_rows(self, model: nn.Module, rows: int, inputs: dict[str, Any]) -> Any:
        self.check_arguments(inputs)
        return self._fill(model, new_cache(model), torch.empty(rows, 0, device=self.vectors.device))

    def key_values(self) -> Tensor:
        """Return the prefix (2·L, k, n, w), from (n, 2·L·k·w) in the checkpoint's layout."""
        return self.encoded().view(self.count, -1, self.heads, self.width).permute(1, 2, 0, 3)

    def states(self, rows: int) -> Tensor:
        """Return keys and values (2·L, B, k, n, w), layer by layer, for the B rows of a call."""
        indices = [index for layer in range(len(self.shapes)) for index in self.indices_of(layer)]
        return self.key_values()[indices].unsqueeze(1).expand(-1, rows, -1, -1, -1)

    def first_positions(self, mask: Tensor) -> Tensor:
        """Return the positions (B, T) of a first call without position_ids, for a mask (B, T) with left padding."""
        return text_positions(mask)

    def filler_count(self, rows: int) -> Tensor | None:
        """Return the number of filler entries in each row (B, 1); None if all rows have the whole prefix."""
        return None

    def indices_of(self, layer: int) -> tuple[int, int]:
        """Return the indices of a layer's key and value among the 2·L tensors of the checkpoint.

        With two submodules, HF PEFT groups the tensors in fours (self-attention and cross-attention) and ignores the
        second pair of each group. So a layer takes every other pair, and the index wraps around at 2·L.
        """
        submodules = self.config.num_transformer_submodules
        first = 2 * submodules * layer % (2 * len(self.shapes))
        return first, first + 1

    def after_forward(self, outputs: Any) -> Any:
        if not self._drops_cache:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(part for part in outputs if not isinstance(part, Cache))
        return type(outputs)(**{key: value for key, value in outputs.items() if not isinstance(value, Cache)})

    # -- disk ------------------------------------------------------------------------------------------------

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Replace the prefix, HF PEFT's method of this name.

        Args:
            prompt_embeddings: Keys and values (n, 2·L·k·w) in the checkpoint's layout.

        Raises:
            ConfigError: The tensor has another shape, or an encoder computes the prefix.
        """
        shape = (self.count, self.size)
        if self.has_encoder():
            raise ConfigError("a prefix that a projection computes cannot be replaced; use prefix_projection=False")
        if tuple(prompt_embeddings.shape) != shape:
            raise ConfigError(
                f"prompt_embeddings must have the shape {shape} of this prefix; got {tuple(prompt_embeddings.shape)}"
            )
        self.load_checkpoint_tensors({EMBEDDINGS: prompt_embeddings})


def tokens_read(inputs: dict[str, Any], side: str) -> Tensor:
    """Return the input tokens of the decoder; an encoder-decoder model derives missing decoder tokens from the labels.

    Args:
        inputs: The call's arguments by name.
        side: "decoder_" for an encoder-decoder model, else "".
    """
    tokens = [inputs.get(f"{side}input_ids"), inputs.get(f"{side}inputs_embeds")]
    if side and all(each is None for each in tokens) and inputs.get("labels") is not None:
        return inputs["labels"]
    return tokens_of(inputs, side)


def _checkpointing(config: Any) -> str:
    """Return the error for a model with activation checkpointing."""
    return (
        f"{config.method} does not work with gradient checkpointing: it needs a cache, which checkpointing "
        "disables; turn checkpointing off (model.activation_checkpointing_disable()) or use PromptTuningConfig"
    )


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
