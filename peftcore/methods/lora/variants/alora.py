"""aLoRA: the adapter acts from the last occurrence of its invocation tokens on. arXiv:2504.12397.

Everything before is the base's own computation, so the cache entries of those positions serve every adapter.
Shapes: b rows, t tokens, r rank.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore._util.per_thread import PerThread
from peftcore.adapter import Shared
from peftcore.bases import BaseWeight
from peftcore.errors import ConfigError, MergeError
from peftcore.methods.lora.variant import Variant, register_variant

if TYPE_CHECKING:
    from peftcore.methods.lora.adapter import Lora
    from peftcore.methods.lora.config import LoraConfig


class Invocation(Shared):
    """Number of last positions of each row at which the adapter acts in the current forward pass."""

    last_positions = PerThread()
    """(b,); None: the adapter acts nowhere."""


_WHOLE_PROMPT = "aLoRA finds its invocation only if one call of the model gets the whole prompt and nothing else"


@register_variant
class Alora(Variant):
    """Variant for `alora_invocation_tokens=[...]`: the adapter acts from the last occurrence of these tokens on."""

    option = "alora_invocation_tokens"
    layer_kinds = frozenset({"linear", "conv", "embedding"})
    stands_alone = True
    is_additive = False
    refused_generate_options = dict.fromkeys(
        ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"), _WHOLE_PROMPT
    )
    beyond_low_rank = "aLoRA acts at some positions only, which this format does not say; train a plain LoRA"

    def is_chosen(self, config: "LoraConfig") -> bool:
        return config.alora_invocation_tokens is not None

    def check(self, config: "LoraConfig") -> None:
        if not config.alora_invocation_tokens:
            raise ConfigError("LoraConfig: alora_invocation_tokens is empty; give the ids that switch the adapter on")

    def make_shared(self, config: "LoraConfig", bases: Mapping[str, BaseWeight]) -> Invocation:
        return Invocation()

    def forward_arguments(self, config: "LoraConfig") -> frozenset[str]:
        return frozenset({"alora_offsets"})

    def before_forward(self, config: "LoraConfig", shared: Any, inputs: dict[str, Any]) -> None:
        assert config.alora_invocation_tokens is not None
        _locate(shared, config.alora_invocation_tokens, inputs)

    def hidden(self, lora: "Lora", h: Tensor) -> Tensor:
        return h * _mask(lora.shared, h)

    def check_mergeable(self, lora: "Lora") -> None:
        raise MergeError("aLoRA acts at some positions only, so no weight equals it; keep it unmerged")


def _mask(shared: Invocation, h: Tensor) -> Tensor:
    """Return 1 for the positions at which the adapter acts and 0 for the others, (b, t, 1) for h (b, t, r)."""
    positions = torch.arange(h.shape[-2], device=h.device)
    if shared.last_positions is None:
        return torch.zeros_like(positions, dtype=h.dtype)[:, None]
    acts = positions >= h.shape[-2] - shared.last_positions.to(h.device)[:, None]  # (b, t)
    return acts[..., None].to(h.dtype)


def _locate(shared: Invocation, tokens: list[int], inputs: dict[str, Any]) -> None:
    """Find the invocation in each row, or take `alora_offsets`; a decoding step keeps the state of its prompt.

    In several tokens behind a cache, such as a prompt whose beginning another call has read, the invocation is looked
    for, too. Rows without one there keep their state.
    """
    ids, offsets = inputs.get("input_ids"), inputs.get("alora_offsets")
    tokens_in = next((inputs[k] for k in ("input_ids", "inputs_embeds") if inputs.get(k) is not None), None)
    if offsets is not None:
        positions = torch.as_tensor([0 if n is None else int(n) for n in offsets])
        beams = 1 if tokens_in is None else len(tokens_in) // len(positions)  # beams of one row are adjacent
        shared.last_positions = positions.repeat_interleave(beams)
        return
    if tokens_in is None and inputs.get("encoder_outputs") is not None:
        return
    if ids is None:
        warnings.warn(
            f"aLoRA acts nowhere in this call: it has no input_ids, in which the invocation {tokens} could be found; "
            "pass alora_offsets",
            stacklevel=2,
        )
        shared.last_positions = None if tokens_in is None else torch.zeros(len(tokens_in), dtype=torch.long)
        return
    cache, before = inputs.get("cache", inputs.get("past_key_values")), shared.last_positions
    if cache is None or cache.get_seq_length() == 0 or before is None:
        shared.last_positions = last_positions(ids, tokens)
        return
    continued = (before > 0) * ids.shape[1]
    if ids.shape[1] > 1:
        found = last_positions(ids, tokens)
        same_rows = len(found) == len(before)
        continued = torch.where(found > 0, found, continued.to(found.device)) if same_rows else found
    shared.last_positions = continued


def last_positions(ids: Tensor, tokens: list[int]) -> Tensor:
    """Return (b,): positions from the last occurrence of `tokens` to the row's end; 0 for rows without one."""
    wanted = torch.tensor(tokens, device=ids.device)
    if ids.shape[1] < len(wanted):
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    matches = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)  # (b, t − n + 1)
    starts = torch.arange(matches.shape[1], device=ids.device)
    distance = torch.where(matches, ids.shape[1] - starts, ids.shape[1] + 1).amin(1)
    return torch.where(matches.any(1), distance, 0)
