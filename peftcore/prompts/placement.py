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
    """(B, 1): how many of the n a row has not; they stand in front of everything and are padding. None for none."""

    @property
    def fills(self) -> Tensor | None:
        """(B, n) bool: virtual tokens that are padding."""
        return None if self.missing is None else torch.arange(self.count, device=self.missing.device) < self.missing

    def insert(self, virtual: Tensor, text: Tensor) -> Tensor:
        """(…, B, n, *), (…, B, T, *) -> (…, B, N, *); the token axis is the last of positions, the second else."""
        axis = 1 if text.is_floating_point() and text.dim() == 3 else -1
        joined = torch.cat([virtual.to(text), text], dim=axis)
        if self.pads is None:
            return joined  # what is missing is in front already
        kinds = torch.where(self.pads, 0, 2)  # padding, then the prompt (1), then the text
        own = kinds.new_ones(len(kinds), self.count) if self.fills is None else (~self.fills).to(kinds)
        order = torch.cat([own, kinds], dim=1).argsort(dim=1, stable=True)
        return joined.take_along_dim(order.unsqueeze(-1) if axis == 1 else order, dim=axis)

    def extend(self, text: Tensor, value: int) -> Tensor:
        """(B, T) -> (B, N) with one value at the virtual tokens: a mask or token types."""
        virtual = text.new_full((len(text), self.count), value)
        return self.insert(virtual if self.fills is None else virtual.masked_fill(self.fills, 0), text)

    def extend_positions(self, positions: Tensor) -> Tensor:
        """(…, B or 1, T) -> (…, B or 1, N): the prompt counts from where the text began, the text goes on after it."""
        own = self.count if self.missing is None else self.count - self.missing
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
    mask: Tensor | None, count: int, all_pads_first: bool = False, missing: Tensor | None = None
) -> Placement:
    """The placement that an attention mask (B, T) asks for.

    all_pads_first: padding behind the text goes to the front too, so that the last token of every row is text.
    missing: (B, 1), how many of the tokens a row has not.
    """
    if mask is None:
        return Placement(count, None, missing)
    pads = mask == 0 if all_pads_first else mask.cumsum(1) == 0
    return Placement(count, pads if bool(pads.any()) else None, missing)


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
