"""Key/value cache of rows with texts of different lengths, padded at the left so that all rows end together.

Rows join and leave the batch between two forwards, and a failed step can be discarded.

Shapes: B rows, h heads, S tokens in the cache, T tokens of the step, d width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens (count) by which a layer's memory grows at a time."""


class GrowingLayer(DynamicLayer):
    """Cache of one layer with reserved memory, so that a step writes only its own keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, h, T, d), and return all of them (B, h, S + T, d)."""
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._memory is None or self._memory[0].shape[-2] < end:
            self._grow(key_states, value_states, length, end + ROOM)
        assert self._memory is not None
        self._memory[0][:, :, length:end] = key_states
        self._memory[1][:, :, length:end] = value_states
        self._show(end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def filled(self, parts: Sequence[tuple[Tensor, Tensor]], length: int) -> "GrowingLayer":
        """Copy the rows of other layers, aligned at the right end of `length` tokens, and return this layer."""
        rows = sum(len(keys) for keys, _ in parts)
        (keys, values), first = parts[0], 0
        self._memory = (
            keys.new_zeros(rows, keys.shape[1], length + ROOM, keys.shape[3]),
            values.new_zeros(rows, values.shape[1], length + ROOM, values.shape[3]),
        )
        for part in parts:
            for memory, tensor in zip(self._memory, part, strict=True):
                memory[first : first + len(tensor), :, length - tensor.shape[2] : length] = tensor
            first += len(part[0])
        self._show(length)
        return self

    def shorten(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        if self._memory is not None:
            self._show(length)

    def _grow(self, keys: Tensor, values: Tensor, length: int, room: int) -> None:
        old = self._memory
        self._memory = (
            keys.new_zeros(*keys.shape[:2], room, keys.shape[3]),
            values.new_zeros(*values.shape[:2], room, values.shape[3]),
        )
        for number in range(2 if old else 0):
            assert old is not None
            self._memory[number][:, :, :length] = old[number][:, :, :length]

    def _show(self, length: int) -> None:
        assert self._memory is not None
        self.keys, self.values = (memory[:, :, :length] for memory in self._memory)
        self.is_initialized = True


class KVCache:
    """Cache of a batch of rows.

    Args:
        mask: (B, S), 1 for tokens and 0 for padding.
        layers: Keys and values of each layer.
    """

    def __init__(self, mask: Tensor, layers: Sequence[GrowingLayer] = ()):
        self.mask = mask
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        self.cache.layers.extend(layers)

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> "KVCache":
        """Return the cache of rows without tokens."""
        return cls(torch.zeros(rows, 0, dtype=torch.long, device=device))

    @classmethod
    def of_rows(
        cls, rows: Sequence[Sequence[tuple[Tensor, Tensor] | None]], lengths: Sequence[int], device: torch.device
    ) -> "KVCache":
        """Return the cache of rows whose keys and values are known.

        Args:
            rows: For each row, keys and values (h, S, d) of each layer, None for a layer that keeps none.
            lengths: S of each row; a row of length 0 has no layers.
            device: Device of the mask.
        """
        longest = max(lengths)
        if not longest:
            return cls.empty(len(rows), device)
        mask = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
        nothing = [pair and (pair[0][:, :0], pair[1][:, :0]) for pair in rows[lengths.index(longest)]]
        layers = zip(*(row or nothing for row in rows), strict=True)
        return cls(mask.long(), [_filled([p and (p[0][None], p[1][None]) for p in parts], longest) for parts in layers])

    @classmethod
    def join(cls, parts: Sequence["KVCache"]) -> "KVCache":
        """Concatenate the rows of several caches."""
        parts = [part for part in parts if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else cls.empty(0)
        length = max(part.length for part in parts)
        mask = torch.cat([torch.nn.functional.pad(part.mask, (length - part.length, 0)) for part in parts])
        return cls(mask, [_filled(layers, length) for layers in zip(*(part._tensors() for part in parts), strict=True)])

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def length(self) -> int:
        """Number of tokens in the cache, padding included: S."""
        return self.mask.shape[1]

    def positions(self, mask: Tensor) -> Tensor:
        """Return the position ids (B, T) of further tokens with this mask (B, T)."""
        before = self.mask.sum(1, keepdim=True)
        return (before + mask.cumsum(1) - 1).clamp(min=0)

    def extend(self, mask: Tensor) -> None:
        """Append the mask (B, T) of further tokens, after a successful forward."""
        self.mask = torch.cat([self.mask, mask], 1)

    def discard_step(self) -> None:
        """Remove the keys and values of a failed forward, for which `extend` was not called."""
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.shorten(self.length)

    def select(self, rows: Sequence[int]) -> "KVCache":
        """Return the cache of some rows, without the padding that all of them share."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        mask = self.mask.index_select(0, chosen)
        start = self.length - int(mask.sum(1).max()) if len(rows) else 0
        picked = [p and tuple(t.index_select(0, chosen)[:, :, start:] for t in p) for p in self._tensors()]
        return KVCache(mask[:, start:], [_filled([pair], self.length - start) for pair in picked])

    def row(self, row: int, tokens: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return keys and values (h, tokens, d) of each layer for the last tokens of a row, without copying."""
        first = self.length - tokens
        return [pair and (pair[0][row, :, first:], pair[1][row, :, first:]) for pair in self._tensors()]

    def _tensors(self) -> list[tuple[Tensor, Tensor] | None]:
        """Return keys and values of each layer; None for an unused layer."""
        layers = self.cache.layers
        return [None if layer.keys is None else (layer.keys, layer.values) for layer in layers]  # type: ignore[misc]


def _filled(parts: Sequence[tuple[Tensor, ...] | None], length: int) -> GrowingLayer:
    tensors = [(part[0], part[1]) for part in parts if part is not None]
    return GrowingLayer().filled(tensors, length) if tensors else GrowingLayer()
