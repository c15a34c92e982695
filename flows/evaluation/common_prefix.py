"""Forward passes over texts that begin with the same tokens, such as a system prompt: the beginning is computed once.

The keys and values of a causal model's first tokens do not depend on the tokens after them. So one forward computes
them for all rows, and the forwards of the rows take only what follows. The numbers are the same up to rounding.

Shapes: B rows, P tokens of the common beginning, T tokens after it, padded.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from flows.data.rows import Row
from flows.data.tokens import IGNORED
from peftcore.kv_cache import growing_cache

LEAST_TOKENS = 16
"""Shortest beginning (tokens) that is computed apart."""
LEAST_ROWS = 8
"""Fewest rows for which it is; computing and checking it takes as long as two rows."""
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1
"""Largest difference from the logits of a whole text that rounding explains, as a share of their norm."""
_PADDING = 8
"""Tokens of padding between beginning and rest in the check, as the shorter prompts of a batch have."""
_LAST = 16
"""Last tokens of a text whose logits are compared: in bfloat16, rounding changes those of one token by up to 15 %."""


class ModelAfterPrefix(nn.Module):
    """A causal language model that has read a prefix: its forward takes the tokens that follow.

    Args:
        model: The model.
        prefix: Keys and values (1, heads, P, width) of the prefix in each layer.
    """

    def __init__(self, model: nn.Module, prefix: Sequence[tuple[Tensor, Tensor]]):
        super().__init__()
        self.module = model  # the name that PyTorch's own wrappers have for it
        self._prefix = prefix
        self.length = prefix[0][0].shape[2]
        """P"""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None, **kwargs: Any) -> Any:
        """Return the model's output for input_ids (B, T) with attention_mask (B, T).

        Args:
            input_ids: The tokens after the prefix.
            attention_mask: 0 for padding.
            cache: What `self.cache` has returned, to be filled; None for a new one.
            kwargs: Further arguments of the model.
        """
        kwargs |= {"cache": self.cache(len(input_ids)) if cache is None else cache, "use_cache": True}
        return self.module(input_ids=input_ids, attention_mask=self.extended(attention_mask), **kwargs)

    @property
    def device(self) -> torch.device:
        """Device of the prefix."""
        return self._prefix[0][0].device

    def cache(self, rows: int, generates: bool = False) -> Cache:
        """Return a new cache of the prefix for some rows. generates: many steps of one token will follow."""
        cache = growing_cache() if generates else DynamicCache()
        for number, (keys, values) in enumerate(self._prefix):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache

    def extended(self, attention_mask: Tensor) -> Tensor:
        """Return the mask (B, P + T) of prefix and rest, given that of the rest (B, T)."""
        return torch.cat([attention_mask.new_ones(len(attention_mask), self.length), attention_mask], 1)


def share_prefix(model: nn.Module, rows: Sequence[Row]) -> tuple[nn.Module, Sequence[Row]]:
    """Return the model after the beginning that all rows share, and the rows without the beginning.

    Both are returned as they are if the beginning is short, the rows are few, or the model computes something else
    from a cache than from whole texts. No supervised token is lost.

    Args:
        model: A causal language model, in the state in which it will compute the rows.
        rows: Rows with `input_ids` and `labels`.
    """
    most = min((_first_supervised(row["labels"]) for row in rows), default=0) - 1  # its logits are the token before's
    after = model_after_prefix(model, [row["input_ids"] for row in rows], most)
    if after is None:
        return model, rows
    start = after.length
    return after, [row | {name: row[name][start:] for name in ("input_ids", "labels")} for row in rows]


def _first_supervised(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


@torch.no_grad()
def model_after_prefix(model: Any, texts: Sequence[Sequence[int]], most: int) -> ModelAfterPrefix | None:
    """Return the model after the beginning that all texts share; None where `share_prefix` would leave them whole.

    Args:
        model: A causal language model, in the state in which it will compute the texts.
        texts: Token ids.
        most: Tokens that the beginning may have at most; less than those of the shortest text.
    """
    if len(texts) < LEAST_ROWS or model.config.is_encoder_decoder:
        return None
    length = min(_common(texts), most)
    if length < LEAST_TOKENS:
        return None
    shortest = torch.tensor([list(min(texts, key=len))], device=model.device)
    cache = getattr(model(input_ids=shortest[:, :length], use_cache=True, **_last_logits(model, 1)), "cache", None)
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) else []
    if not layers or any(type(layer) is not DynamicLayer or layer.get_seq_length() != length for layer in layers):
        return None  # a window, a recurrent state, or virtual tokens
    after = ModelAfterPrefix(model, [(layer.keys, layer.values) for layer in layers])
    return after if _computes_the_same(after, shortest) else None


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens are the same in all texts."""
    lists = [list(text) for text in texts]
    first, last = min(lists), max(lists)  # the two that differ first, because lists compare by elements
    return next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def _last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """Return the argument with which a model computes the logits of the last tokens only; {} if it has none.

    The logits of a long prompt would take more memory than the rest of the forward.
    """
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _computes_the_same(after: ModelAfterPrefix, text: Tensor) -> bool:
    """Return True if the last tokens of a text (1, P + T) have the same logits, up to rounding, after the prefix."""
    model: Any = after.module
    rest = text[:, after.length :]
    count = min(_LAST, rest.shape[1])
    options: dict[str, Any] = _last_logits(model, count)
    padded, mask = F.pad(rest, (_PADDING, 0)), F.pad(torch.ones_like(rest), (_PADDING, 0))
    positions: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions["position_ids"] = (after.length + mask.cumsum(1) - 1).clamp(min=0)
    outputs = (
        model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False, **options),
        after(padded, mask, **positions, **options),
    )
    whole, resumed = (output.logits[0, -count:].double() for output in outputs)
    narrow = min(model.dtype.itemsize, outputs[0].logits.dtype.itemsize) < 4
    tolerance = TOLERANCE_16_BITS if narrow else TOLERANCE
    return bool((whole - resumed).norm() <= tolerance * (whole - whole.mean(-1, keepdim=True)).norm())
