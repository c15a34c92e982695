"""The values that the weights of a quantised layer can take while their scales stay as they are.

    value[o, i] = offset[o, i] + scale[o, i] · level[code[o, i]]

Shapes: o out_features, i in_features, k levels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Levels, scales and offsets of one quantised weight (o, i)."""

    levels: Tensor
    """(k,) float32, the level of each code."""
    scale: Tensor
    """(o, i) float32."""
    offset: Tensor | None
    """(o, i) float32; None: 0."""
    dtype: torch.dtype
    """Dtype to which the storage rounds a dequantised value."""

    def values(self, codes: Tensor, columns: Any = slice(None)) -> Tensor:
        """Return the dequantised values of codes in float32, rounded as the storage rounds them.

        Args:
            codes: Codes (o, i), or those of some columns.
            columns: Index or slice of these columns.
        """
        values = self.levels[codes.long()] * self.scale[:, columns]
        return (values if self.offset is None else values + self.offset[:, columns]).to(self.dtype).float()

    def nearest(self, weight: Tensor, columns: Any = slice(None)) -> Tensor:
        """Return the codes, uint8, of the values that are nearest to a weight in float32.

        Args:
            weight: Weight (o, i), or some columns of it.
            columns: Index or slice of these columns.
        """
        scale = self.scale[:, columns]
        shifted = weight if self.offset is None else weight - self.offset[:, columns]
        relative = torch.where(scale == 0, 0, shifted / scale)
        return self._ascending_codes[torch.bucketize(relative.contiguous(), self._middles)]

    def permuted(self, order: Tensor) -> "Grid":
        """Return the grid with its columns in another order."""
        offset = None if self.offset is None else self.offset[:, order]
        return Grid(self.levels, self.scale[:, order], offset, self.dtype)

    @cached_property
    def _ascending_codes(self) -> Tensor:
        """(k,) codes by ascending level."""
        return self.levels.argsort().to(torch.uint8)

    @cached_property
    def _middles(self) -> Tensor:
        """(k − 1,) values between neighbouring levels, ascending."""
        ascending = self.levels.sort().values
        return (ascending[1:] + ascending[:-1]) / 2
