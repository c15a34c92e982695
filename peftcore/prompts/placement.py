"""Where virtual tokens stand in a batch: in front of a row's text, behind the padding that leads it.

    right-padded  P P t t t 0 0        left-padded  0 0 P P t t t

So a row computes what it would compute alone. Shapes: B rows, n virtual tokens, T text tokens, N = n + T.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """n virtual tokens among T text tokens."""

    count: int
    pads: Tensor | None
    """(B, T) bool: the padding that stays in front of the virtual tokens; None for none."""
    missing: Tensor | None = None
    """(B, 1): how many of the n a row has not; they are padding. None for none."""
    behind: bool = False
    """Whether what is missing stands behind the text, where a model reads the first token for a row; else in front."""

    @property
    def fills(self) -> Tensor | None:
        """(B, n) bool: virtual tokens that are padding."""
        return None if self.missing is None else torch.arange(self.count, device=self.missing.device) < self.missing

    @property
    def own_count(self) -> int | Tensor:
        """n, or (B, 1): how many each row has."""
        return self.count if self.missing is None else self.count - self.missing

    def shift(self, text: Tensor, value: int) -> Tensor:
        """(B, T) -> (B, N) with one value at the virtual tokens and at those that are missing: labels."""
        return self.insert(text.new_full((len(text), self.count), value), text)

    def insert(self, virtual: Tensor, text: Tensor) -> Tensor:
        """(…, B, n, *), (…, B, T, *) -> (…, B, N, *); the token axis is the last of positions, the second else."""
        axis = 1 if text.is_floating_point() and text.dim() == 3 else -1
        joined = torch.cat([virtual.to(text), text], dim=axis)
        fills = self.fills
        if self.pads is None and (fills is None or not self.behind):
            return joined  # what is missing is in front already
        rows, length = (len(joined), text.shape[axis])
        kinds = torch.full((rows, self.count + length), 2, device=joined.device)  # padding, the prompt (1), the text
        kinds[:, : self.count] = 1
        if fills is not None:
            kinds[:, : self.count].masked_fill_(fills, 3 if self.behind else 0)
        if self.pads is not None:
            kinds[:, self.count :].masked_fill_(self.pads, 0)
        order = kinds.argsort(dim=1, stable=True)
        return joined.take_along_dim(order.unsqueeze(-1) if axis == 1 else order, dim=axis)

    def extend(self, text: Tensor, value: int) -> Tensor:
        """(B, T) -> (B, N) with one value at the virtual tokens: a mask or token types."""
        virtual = text.new_full((len(text), self.count), value)
        return self.insert(virtual if self.fills is None else virtual.masked_fill(self.fills, 0), text)

    def extend_positions(self, positions: Tensor) -> Tensor:
        """(…, B or 1, T) -> (…, B or 1, N): the prompt counts from where the text began, the text goes on after it."""
        own = self.own_count
        if self.pads is None:
            start, shifted = positions.amin(-1, keepdim=True), positions + own
        else:
            positions = positions.expand(*positions.shape[:-2], *self.pads.shape)
            last = torch.iinfo(positions.dtype).max
            start = positions.masked_fill(self.pads, last).amin(-1, keepdim=True)
            start = torch.where(start == last, 0, start)  # a row of padding only
            shifted = torch.where(self.pads, positions, positions + own)
        places = torch.arange(self.count, device=positions.device)
        if self.missing is not None:
            places = (places - self.missing).clamp(min=0)
        virtual = start + places
        return self.insert(virtual.expand(*shifted.shape[:-1], -1), shifted.expand(*virtual.shape[:-1], -1))


def placement(
    mask: Tensor | None,
    count: int,
    all_pads_first: bool = False,
    missing: Tensor | None = None,
    behind: bool = False,
) -> Placement:
    """The placement that an attention mask (B, T) asks for.

    all_pads_first: padding behind the text goes to the front too, so that the last token of every row is text.
    missing: (B, 1), how many of the tokens a row has not; behind: where they are padding, behind the text.
    """
    if mask is None:
        return Placement(count, None, missing, behind)
    pads = mask == 0 if all_pads_first else mask.cumsum(1) == 0
    return Placement(count, pads if bool(pads.any()) else None, missing, behind)


def text_positions(mask: Tensor) -> Tensor:
    """(B, T) mask -> positions that count a row's tokens and not its padding, as `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0) * (mask != 0)


def mask_of(inputs: dict[str, Any], key: str) -> Tensor | None:
    """The attention mask (B, T) under `key`; ConfigError for one that is prepared already."""
    mask = inputs.get(key)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ConfigError(f"{key} {shape} leaves no room for a prompt; give the mask of padding, (rows, tokens)")


def check_not_packed(inputs: dict[str, Any]) -> None:
    """ConfigError for rows that hold several documents: only the first would have the prompt before it."""
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None or positions.shape[-1] < 2:
        return
    if bool((positions.diff(dim=-1) < 0).any()):
        raise ConfigError("position_ids start again inside a row, so documents are packed; a prompt fits one a row")


def tokens_of(inputs: dict[str, Any], prefix: str = "") -> Tensor:
    """Token ids (B, T) or embeddings (B, T, d) of the call."""
    for key in (f"{prefix}input_ids", f"{prefix}inputs_embeds"):
        if inputs.get(key) is not None:
            return inputs[key]
    raise ConfigError(f"a prompt needs text to stand before; give {prefix}input_ids or {prefix}inputs_embeds")
