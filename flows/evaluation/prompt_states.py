"""Keys and values of prompts, which the losses of the rows compute anyway and the answers to the prompts continue from.

Only on a CPU, where reading the prompts again would take a sixth of the time of an evaluation, and after a common
beginning, for which `common_prefix` has checked that the model computes the same from a cache as from whole texts.

Shapes: B rows, P tokens of the common beginning, T tokens after it, padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from flows.evaluation.common_prefix import ModelAfterPrefix

MAX_KEPT = 2**30
"""Memory for keys and values (bytes). If those of all prompts do not fit, the prompts are read again."""


class PromptStates:
    """Keys and values of prompts, each without its last token, with which the answer begins.

    Args:
        rows: The row of each prompt, among the rows that are scored.
        lengths: Tokens of each prompt.
    """

    def __init__(self, rows: Sequence[int], lengths: Sequence[int]):
        self._prompt_of = {row: number for number, row in enumerate(rows)}
        self._lengths = lengths
        self._room = MAX_KEPT
        self._of: dict[int, list[tuple[Tensor, ...]]] = {}
        """{number of a prompt: keys and values (heads, T, width) of each layer}"""
        self.after: ModelAfterPrefix | None = None
        """The model after the common beginning; None if no state has been kept."""

    @property
    def is_complete(self) -> bool:
        """True if the states of all prompts are here."""
        return self.after is not None and len(self._of) == len(self._lengths)

    def cache_for(self, model: nn.Module, rows: Sequence[int]) -> Cache | None:
        """Return a cache for a forward of these rows, which `keep` then gets; None if nothing of it would be kept."""
        if not isinstance(model, ModelAfterPrefix) or model.device.type != "cpu":
            return None
        if self._room <= 0 or self._prompt_of.keys().isdisjoint(rows):
            return None
        self.after = model
        return model.cache(len(rows))

    def keep(self, rows: Sequence[int], cache: Cache) -> None:
        """Copy the states of the prompts from a cache (B, heads, P + T, width) that the forward has filled."""
        assert self.after is not None
        for place, row in enumerate(rows):
            number = self._prompt_of.get(row)
            if number is None:
                continue
            part = slice(self.after.length, self._lengths[number] - 1)
            layers: list[Any] = cache.layers
            states = [tuple(kind[place, :, part].clone() for kind in (one.keys, one.values)) for one in layers]
            self._of[number] = states
            self._room -= sum(tensor.nbytes for pair in states for tensor in pair)
        if self._room <= 0:
            self._of.clear()

    def cache_of(self, prompts: Sequence[int]) -> Cache:
        """Return a cache (B, heads, P + T - 1, width) of prompts, by number, padded on the left after the beginning."""
        assert self.after is not None
        cache, states = self.after.cache(len(prompts), generates=True), [self._of[number] for number in prompts]
        for layer, pairs in enumerate(zip(*states, strict=True)):
            keys, values = (_left_padded(tensors) for tensors in zip(*pairs, strict=True))
            cache.update(keys, values, layer)
        return cache


def _left_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (heads, T, width) of several lengths as one (B, heads, T, width), zeros before the shorter."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, 0, longest - tensor.shape[1], 0)) for tensor in tensors])
