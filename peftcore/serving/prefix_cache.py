"""Prefix cache: keys and values of the beginnings of earlier prompts, which later requests of the same model reuse.

Prompts are stored in blocks of `BLOCK` tokens. A block belongs to one model (composition and adapter weights) and to
all tokens before it. So a reused block is of the same text under the same weights.

Shapes: h heads, d width of a head.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Tokens of a block (count)."""

KeysAndValues = tuple[Tensor, Tensor] | None
"""Keys and values (h, tokens, d) of one layer; None for a layer that keeps none."""


@dataclass(frozen=True)
class Block:
    """Keys and values of `BLOCK` consecutive tokens in every layer."""

    number: int
    """Identifies the block; no other block has or gets this number."""
    layers: tuple[KeysAndValues, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer or ())


class PrefixCache:
    """Blocks of prompts up to a limit of memory; the least recently used are removed first.

    Used by one thread.

    Args:
        max_bytes: Largest size of all blocks (bytes). None: nothing is stored.
    """

    def __init__(self, max_bytes: int | None):
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[tuple[Hashable, tuple[int, ...]], Block] = OrderedDict()
        """{(number of the block before, or the model, tokens): block}, the least recently used first."""
        self._numbers = itertools.count()
        self.size = 0
        """Bytes of all blocks."""

    def find(self, model: Hashable, prompt: Sequence[int]) -> list[Block]:
        """Return the blocks of the longest stored beginning of a prompt.

        Args:
            model: Composition and adapter weights.
            prompt: Token ids.
        """
        found: list[Block] = []
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        before: Hashable = ("model", model)
        for tokens in _blocks_of(prompt):
            key = (before, tokens)
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
            keys.append(key)
            before = block.number
        self._touch(keys)
        return found

    def store(self, model: Hashable, prompt: Sequence[int], layers: Sequence[KeysAndValues]) -> None:
        """Store the whole blocks of a prompt that are not stored yet.

        Args:
            model: Composition and adapter weights.
            prompt: Token ids.
            layers: Keys and values (h, prompt, d) of each layer.
        """
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        before: Hashable = ("model", model)
        for count, tokens in enumerate(_blocks_of(prompt)):
            key = (before, tokens)
            if (block := self._blocks.get(key)) is None:
                first, last = count * BLOCK, (count + 1) * BLOCK
                parts = (pair and (pair[0][:, first:last].clone(), pair[1][:, first:last].clone()) for pair in layers)
                block = Block(next(self._numbers), tuple(parts))
                if not self._make_room(block.size, keys):
                    break
                self._blocks[key] = block
                self.size += block.size
            keys.append(key)
            before = block.number
        self._touch(keys)

    def _make_room(self, size: int, kept: list[tuple[Hashable, tuple[int, ...]]]) -> bool:
        """Remove blocks until `size` bytes fit; False if they cannot without the blocks `kept`."""
        self._touch(kept)
        while self._max_bytes is not None and self.size + size > self._max_bytes and len(self._blocks) > len(kept):
            self.size -= self._blocks.popitem(last=False)[1].size
        return self._max_bytes is not None and self.size + size <= self._max_bytes

    def _touch(self, keys: Sequence[tuple[Hashable, tuple[int, ...]]]) -> None:
        """Mark blocks as just used, the first of a prompt last: so no block is removed before those that follow it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _blocks_of(prompt: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the whole blocks of a prompt."""
    return [tuple(prompt[first : first + BLOCK]) for first in range(0, len(prompt) - BLOCK + 1, BLOCK)]


def joined(blocks: Sequence[Block], tokens: int) -> list[KeysAndValues]:
    """Return keys and values (h, tokens, d) of each layer for the first `tokens` tokens of the blocks."""

    def whole(parts: Sequence[KeysAndValues]) -> KeysAndValues:
        keys, values = (torch.cat([part[side] for part in parts if part], 1) for side in (0, 1))
        return keys[:, :tokens], values[:, :tokens]

    return [whole(parts) if all(parts) else None for parts in zip(*(block.layers for block in blocks), strict=True)]
