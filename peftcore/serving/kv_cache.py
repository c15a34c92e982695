"""Key/value cache of rows with texts of different lengths, padded at the left so that all rows end together.

Rows join and leave the batch between two forwards, and a failed step can be discarded.

Shapes: B rows, h heads, S tokens in the cache, T tokens of the step, d width of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.kv_cache import GrowingLayer, growing_cache


class KVCache:
    """Cache of a batch of rows.

    Args:
        mask: (B, S), 1 for tokens and 0 for padding.
        layers: Keys and values of each layer.
    """

    def __init__(self, mask: Tensor, layers: Sequence[GrowingLayer] = ()):
        self.mask = mask
        self.cache = growing_cache(layers)

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
