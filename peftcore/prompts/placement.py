"""Placement of virtual tokens (P) in a padded batch: directly before the text (t) of each row, after left padding (0).

    right-padded  P P t t t 0 0        left-padded  0 0 P P t t t

Then each row's output equals running that row alone. Shapes: B rows, n virtual tokens, T text tokens, N = n + T.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """The placement of n virtual tokens among T text tokens.

    In a mixed batch, rows have prompts of different lengths. A row with fewer than n virtual tokens has masked filler
    tokens in place of the others.
    """

    count: int
    pads: Tensor | None
    """(B, T) bool: padding that stays in front of the virtual tokens; None if there is none."""
    filler_count: Tensor | None = None
    """(B, 1): number of filler tokens in each row; None if no row has any."""
    filler_behind: bool = False
    """True if filler stands behind the text, for models that count positions from the first token; else in front."""

    @property
    def filler(self) -> Tensor | None:
        """(B, n) bool: True for filler; None if there is none."""
        return (
            None
            if self.filler_count is None
            else torch.arange(self.count, device=self.filler_count.device) < self.filler_count
        )

    @property
    def count_by_row(self) -> int | Tensor:
        """Number of virtual tokens without filler: n for all rows, or (B, 1)."""
        return self.count if self.filler_count is None else self.count - self.filler_count

    def shift(self, text: Tensor, value: int) -> Tensor:
        """Return labels (B, N) for labels `text` (B, T), with `value` at virtual tokens and filler."""
        return self.insert(text.new_full((len(text), self.count), value), text)

    def insert(self, virtual: Tensor, text: Tensor) -> Tensor:
        """Return virtual tokens and text joined along the token axis, each row in its order.

        Args:
            virtual: Values of the virtual tokens: (B, n, d) for embeddings, (..., B, n) for ids, masks and positions.
            text: Values of the text, of the same layout with T in place of n.

        Returns:
            (B, N, d) or (..., B, N).
        """
        axis = 1 if text.is_floating_point() and text.dim() == 3 else -1
        joined = torch.cat([virtual.to(text), text], dim=axis)
        filler = self.filler
        if self.pads is None and (filler is None or not self.filler_behind):
            return joined  # filler in front needs no reordering
        rows, length = (joined.shape[axis - 1], text.shape[axis])
        # sort keys: 0 padding and filler in front, 1 prompt, 2 text, 3 filler behind
        keys = torch.full((rows, self.count + length), 2, device=joined.device)
        keys[:, : self.count] = 1
        if filler is not None:
            keys[:, : self.count].masked_fill_(filler, 3 if self.filler_behind else 0)
        if self.pads is not None:
            keys[:, self.count :].masked_fill_(self.pads, 0)
        order = keys.argsort(dim=1, stable=True)
        return joined.take_along_dim(order.unsqueeze(-1) if axis == 1 else order.expand(joined.shape), dim=axis)

    def extend(self, text: Tensor, value: int) -> Tensor:
        """Return a mask or token types (B, N) for `text` (B, T), with `value` at virtual tokens and 0 at filler."""
        virtual = text.new_full((len(text), self.count), value)
        return self.insert(virtual if self.filler is None else virtual.masked_fill(self.filler, 0), text)

    def extend_positions(self, positions: Tensor) -> Tensor:
        """Return positions (..., B or 1, N): the prompt takes the text's first positions and the text follows.

        Args:
            positions: Positions of the text (..., B or 1, T).
        """
        shift = self.count_by_row
        if self.pads is None:
            start, shifted = positions.amin(-1, keepdim=True), positions + shift
        else:
            positions = positions.expand(*positions.shape[:-2], *self.pads.shape)
            last = torch.iinfo(positions.dtype).max
            start = positions.masked_fill(self.pads, last).amin(-1, keepdim=True)
            start = torch.where(start == last, 0, start)  # a row of padding only
            shifted = torch.where(self.pads, positions, positions + shift)
        offsets = torch.arange(self.count, device=positions.device)
        if self.filler_count is not None:
            offsets = (offsets - self.filler_count).clamp(min=0)
        virtual = start + offsets
        return self.insert(virtual.expand(*shifted.shape[:-1], -1), shifted.expand(*virtual.shape[:-1], -1))


def placement(
    mask: Tensor | None,
    count: int,
    all_pads_first: bool = False,
    filler_count: Tensor | None = None,
    filler_behind: bool = False,
) -> Placement:
    """Return the placement for an attention mask.

    Args:
        mask: The mask of padding (B, T), or None.
        count: n.
        all_pads_first: Also move right padding to the front, so that the last token of each row is text.
        filler_count: Number of filler tokens in each row (B, 1), or None.
        filler_behind: Put filler behind the text.
    """
    if mask is None:
        return Placement(count, None, filler_count, filler_behind)
    pads = mask == 0 if all_pads_first else mask.cumsum(1) == 0
    return Placement(count, pads if bool(pads.any()) else None, filler_count, filler_behind)


def text_positions(mask: Tensor) -> Tensor:
    """Return positions (B, T) that count a row's tokens without padding, as `generate` does, for a mask (B, T)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0) * (mask != 0)


def mask_of(inputs: dict[str, Any], key: str) -> Tensor | None:
    """Return the attention mask (B, T) under `key`, or None.

    Raises:
        ConfigError: The mask has another shape, such as a prepared 4-dimensional mask.
    """
    mask = inputs.get(key)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ConfigError(f"{key} {shape} cannot be extended by a prompt; give a padding mask (rows, tokens)")


def check_not_packed(inputs: dict[str, Any]) -> None:
    """Raise ConfigError for packed rows: only the first document of a row would have a prompt."""
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or positions.shape[-1] < 2:
        return
    if bool((positions.diff(dim=-1) < 0).any()):
        raise ConfigError(
            "position_ids restart inside a row, so documents are packed; a prompt needs one document per row"
        )


def tokens_of(inputs: dict[str, Any], prefix: str = "") -> Tensor:
    """Return the call's token ids (B, T) or embeddings (B, T, d).

    Args:
        inputs: The call's arguments by name.
        prefix: "decoder_" for the decoder's arguments, else "".
    """
    for key in (f"{prefix}input_ids", f"{prefix}inputs_embeds"):
        if inputs.get(key) is not None:
            return inputs[key]
    raise ConfigError(f"a prompt needs a text; give {prefix}input_ids or {prefix}inputs_embeds")
