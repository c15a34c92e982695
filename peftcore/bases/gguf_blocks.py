"""Block formats of GGUF files: packing, dequantisation to the values of the `gguf` package, and their grids.

A quantised GGUF row is a sequence of blocks. A block holds 32 or 256 weights as codes of 4 to 8 bits, with scales in
half precision:

    Q4_0, Q5_0, Q8_0    w = d·(q − z)
    Q4_1, Q5_1          w = d·q + m
    Q4_K, Q5_K          w = (d·s)·q − (e·t)     s, t: 6-bit scales of 32 weights each
    Q6_K                w = (d·s)·(q − 32)      s: 8-bit scales of 16 weights each

Each product is exact in float32, so every order of the operations gives the same bits.

In memory the blocks of a weight are transposed to `planes` (n, b, o): byte b of block n of output o. Neighbouring bytes
then belong to neighbouring outputs and have the same meaning, so every operation runs over long contiguous stretches.
With the order of the file, a CPU needs ten times as long. Formats: https://github.com/ggml-org/ggml (ggml-common.h).

Shapes: o outputs, i inputs, n blocks in a row, b bytes of a block, k weights of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peftcore.bases.grid import Grid

CHUNK = 1 << 18
"""Weights that are dequantised together on a CPU (count), so that intermediate values stay in its cache."""


class BlockFormat(NamedTuple):
    """One block format."""

    name: str
    number: int
    """Number of the type in GGUF files (`ggml_type`)."""
    weights: int
    """k: weights of a block."""
    size: int
    """b: bytes of a block."""
    unpack: Callable[[Tensor], tuple[Tensor, int, Tensor, Tensor | None]]
    """From planes (n, b, o) to codes (n, s, k/s, o), the code of zero, scales (n, s, 1, o), and the offset to add in
    the scales' shape, or None. A block has s groups with a scale of their own."""
    put: Callable[[Tensor, Tensor], None]
    """Writes codes (n, k, o), uint8, into planes (n, b, o) in place; scales stay. The bytes of signed codes count."""

    def pack(self, rows: Tensor) -> Tensor:
        """Return the planes (n, b, o) of a file's rows (o, n·b)."""
        return rows.view(len(rows), -1, self.size).permute(1, 2, 0).contiguous()

    def rows(self, planes: Tensor) -> Tensor:
        """Return the rows (o, n·b) of a file from planes (n, b, o)."""
        return planes.permute(2, 0, 1).flatten(1)

    def dequantize(self, planes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (o, i), computed in float32 and rounded to `dtype`; a view with stride (1, o).

        Args:
            planes: The packed weight (n, b, o), uint8.
            dtype: A floating-point type.
        """
        blocks, _, outputs = planes.shape
        step = max(1, CHUNK // (self.weights * outputs)) if planes.is_cpu else max(1, blocks)
        if step >= blocks and dtype == torch.float32:
            return self._values(planes).reshape(-1, outputs).T
        weight = torch.empty(blocks, self.weights, outputs, dtype=dtype, device=planes.device)
        for start in range(0, blocks, step):
            chunk = slice(start, start + step)
            weight[chunk] = self._values(planes[chunk]).flatten(1, 2)
        return weight.view(-1, outputs).T

    def grid(self, planes: Tensor) -> Grid:
        """Return the values that a packed weight can take while its scales stay.

        Args:
            planes: The packed weight (n, b, o).
        """
        codes, zero, scales, offset = self.unpack(planes)
        blocks, groups, weights, outputs = codes.shape
        first, count = (-128, 256) if codes.dtype == torch.int8 else (0, 1 << self.code_bits)
        levels = torch.arange(first, first + count, dtype=torch.float32, device=planes.device) - zero

        def spread(values: Tensor) -> Tensor:
            return values.expand(blocks, groups, weights, outputs).reshape(-1, outputs).T

        return Grid(levels, spread(scales), None if offset is None else spread(offset), torch.float32)

    def with_codes(self, planes: Tensor, codes: Tensor) -> Tensor:
        """Return a copy of a packed weight with other codes.

        Args:
            planes: The packed weight (n, b, o).
            codes: Positions (o, i) in the levels of `grid`.
        """
        new, codes = planes.clone(), codes.to(torch.uint8).T.reshape(len(planes), self.weights, -1)
        signed = self.unpack(planes[:1])[0].dtype == torch.int8
        self.put(new, codes ^ 128 if signed else codes)  # position 0 is the code -128
        return new

    @property
    def code_bits(self) -> int:
        """Bits of a code: the digit in the format's name."""
        return int(self.name[1])

    def _values(self, planes: Tensor) -> Tensor:
        codes, zero, scales, offset = self.unpack(planes)
        values = codes.float()
        if zero:
            values.sub_(zero)
        values.mul_(scales)
        return values if offset is None else values.add_(offset)


def _halves(planes: Tensor, first: int) -> Tensor:
    """Return the half-precision numbers (n, 1, 1, o) at bytes `first` and `first` + 1, as float32."""
    pairs = planes[:, first : first + 2].transpose(1, 2).contiguous()
    return pairs.view(torch.float16).float().view(len(planes), 1, 1, -1)


def _lanes(planes: Tensor) -> tuple[Tensor, int]:
    """Return bytes eight at a time, if the outputs allow it, and the number that has a 1 in each byte."""
    return (planes.view(torch.int64), 0x0101010101010101) if planes.shape[-1] % 8 == 0 else (planes, 1)


def _nibbles(planes: Tensor, first: int, count: int, groups: int) -> Tensor:
    """Return the 4-bit codes of `count` bytes (n, groups, 2, count/groups, o): all low halves, then all high ones."""
    lanes, ones = _lanes(planes[:, first : first + count])
    lanes = lanes.unflatten(1, (groups, 1, -1))
    codes = torch.cat((lanes, lanes >> 4), 2).bitwise_and_(15 * ones)
    return codes.view(torch.uint8)


def _add_high_bits(codes: Tensor, planes: Tensor, shift: int, bits: int) -> None:
    """Add `bits` bits of bytes (…, o), from bit `shift` on, to 4-bit codes as bits 4 and above."""
    lanes, ones = _lanes(planes)
    codes.view(lanes.dtype).bitwise_or_((lanes >> shift).bitwise_and_(((1 << bits) - 1) * ones) << 4)


def _q4_0(planes: Tensor) -> tuple[Tensor, int, Tensor, None]:
    return _nibbles(planes, 2, 16, 1).flatten(1, 3).unsqueeze(1), 8, _halves(planes, 0), None


def _q4_1(planes: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    return _nibbles(planes, 4, 16, 1).flatten(1, 3).unsqueeze(1), 0, _halves(planes, 0), _halves(planes, 2)


def _five_bits(planes: Tensor, first: int) -> Tensor:
    """Return the codes (n, 1, 32, o) of a block with fifth bits from byte `first` on; code 8c+t has bit t of byte c."""
    codes, fifth = _nibbles(planes, first + 4, 16, 1).flatten(1, 3), planes[:, first : first + 4]
    for bit in range(8):
        _add_high_bits(codes.unflatten(1, (4, 8))[:, :, bit], fifth, bit, 1)
    return codes.unsqueeze(1)


def _q5_0(planes: Tensor) -> tuple[Tensor, int, Tensor, None]:
    return _five_bits(planes, 2), 16, _halves(planes, 0), None


def _q5_1(planes: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    return _five_bits(planes, 4), 0, _halves(planes, 0), _halves(planes, 2)


def _q8_0(planes: Tensor) -> tuple[Tensor, int, Tensor, None]:
    return planes[:, 2:].view(torch.int8).unsqueeze(1), 0, _halves(planes, 0), None


def _k_scales(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and offsets (n, 8, 1, o), from the 6-bit numbers at bytes 4 to 16 of Q4_K and Q5_K."""
    scale, minimum, high = planes[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat((scale & 63, (high & 15) | (scale >> 2 & 48)), 1)
    minima = torch.cat((minimum & 63, (high >> 4) | (minimum >> 2 & 48)), 1)
    offsets = _halves(planes, 2) * minima.float().unsqueeze(2)
    return _halves(planes, 0) * scales.float().unsqueeze(2), offsets.neg_()


def _q4_k(planes: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    return _nibbles(planes, 16, 128, 4).flatten(1, 2), 0, *_k_scales(planes)


def _q5_k(planes: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    codes = _nibbles(planes, 48, 128, 4).flatten(1, 2)
    for group in range(8):
        _add_high_bits(codes[:, group], planes[:, 16:48], group, 1)
    return codes, 0, *_k_scales(planes)


def _q6_k(planes: Tensor) -> tuple[Tensor, int, Tensor, None]:
    codes = _nibbles(planes, 0, 128, 2).flatten(1, 3).unflatten(1, (2, 4, 32))
    high = planes[:, 128:192].unflatten(1, (2, 32))
    for group in range(4):
        _add_high_bits(codes[:, :, group], high, 2 * group, 2)
    scales = planes[:, 192:208].view(torch.int8).float().unsqueeze(2)
    return codes.flatten(1, 3).unflatten(1, (16, 16)), 32, _halves(planes, 208) * scales, None


def _put_nibbles(planes: Tensor, first: int, count: int, groups: int, codes: Tensor) -> None:
    """Write the low four bits of codes (n, k, o) to `count` bytes in the order of `_nibbles`."""
    low, high = (codes & 15).unflatten(1, (groups, 2, -1)).unbind(2)
    planes[:, first : first + count] = (low | high << 4).flatten(1, 2)


def _put_five_bits(planes: Tensor, first: int, codes: Tensor) -> None:
    """Write codes (n, 32, o) with fifth bits from byte `first` on, in the order of `_five_bits`."""
    _put_nibbles(planes, first + 4, 16, 1, codes)
    planes[:, first : first + 4] = _bits_together((codes >> 4).unflatten(1, (4, 8)), 2, 1)


def _bits_together(parts: Tensor, axis: int, bits: int) -> Tensor:
    """Return the bytes whose bits from `bits` · t on are part t of an axis."""
    pieces = parts.unbind(axis)
    together = pieces[0].clone()
    for index, piece in enumerate(pieces[1:], 1):
        together |= piece << bits * index
    return together


def _put_q4_0(planes: Tensor, codes: Tensor) -> None:
    _put_nibbles(planes, 2, 16, 1, codes)


def _put_q4_1(planes: Tensor, codes: Tensor) -> None:
    _put_nibbles(planes, 4, 16, 1, codes)


def _put_q5_0(planes: Tensor, codes: Tensor) -> None:
    _put_five_bits(planes, 2, codes)


def _put_q5_1(planes: Tensor, codes: Tensor) -> None:
    _put_five_bits(planes, 4, codes)


def _put_q8_0(planes: Tensor, codes: Tensor) -> None:
    planes[:, 2:] = codes


def _put_q4_k(planes: Tensor, codes: Tensor) -> None:
    _put_nibbles(planes, 16, 128, 4, codes)


def _put_q5_k(planes: Tensor, codes: Tensor) -> None:
    _put_nibbles(planes, 48, 128, 4, codes)
    planes[:, 16:48] = _bits_together((codes >> 4).unflatten(1, (8, 32)), 1, 1)


def _put_q6_k(planes: Tensor, codes: Tensor) -> None:
    _put_nibbles(planes, 0, 128, 2, codes)
    planes[:, 128:192] = _bits_together((codes >> 4).unflatten(1, (2, 4, 32)), 2, 2).flatten(1, 2)


FORMATS = {
    one.name: one
    for one in (
        BlockFormat("Q4_0", 2, 32, 18, _q4_0, _put_q4_0),
        BlockFormat("Q4_1", 3, 32, 20, _q4_1, _put_q4_1),
        BlockFormat("Q5_0", 6, 32, 22, _q5_0, _put_q5_0),
        BlockFormat("Q5_1", 7, 32, 24, _q5_1, _put_q5_1),
        BlockFormat("Q8_0", 8, 32, 34, _q8_0, _put_q8_0),
        BlockFormat("Q4_K", 12, 256, 144, _q4_k, _put_q4_k),
        BlockFormat("Q5_K", 13, 256, 176, _q5_k, _put_q5_k),
        BlockFormat("Q6_K", 14, 256, 210, _q6_k, _put_q6_k),
    )
}
"""{name: format}"""
