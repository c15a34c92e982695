"""Prompts of different names over the rows of one batch.

Each row has the prompt that it would have alone. The shorter ones are filled up by tokens (or by entries of the cache)
that the mask leaves out: in front, so that a decoder's text stands at the end, as does what is said of it; behind
the text where a model counts positions from the first token.

Shapes: B rows, N compositions of a route, B/N rows each in turn, n the longest prompt's length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.errors import RoutingError
from peftcore.prompts.cache import cache_of, is_empty
from peftcore.prompts.learner import PromptLearner, is_encoder_decoder, takes
from peftcore.prompts.placement import Placement, mask_of, placement, text_positions, tokens_of
from peftcore.prompts.prefix_tuning import PrefixTuning, tokens_read
from peftcore.prompts.virtual_tokens import VirtualTokens

Learners = Sequence[Any]
"""(N): the learner of each composition, or None."""
Narrow = Callable[[Any, list[int]], Any]
"""(an argument of the call, numbers of compositions) -> the argument for their rows alone"""


def mixed(learners: Sequence[Sequence[PromptLearner]], narrow: Narrow, has_encoder: bool) -> list[PromptLearner]:
    """What stands for the prompts of a batch's rows; learners: of each composition, those that feed the model."""
    found: list[Any] = []
    bare = [not of_row for of_row in learners]
    for kind, stands in ((VirtualTokens, MixedTokens), (PrefixTuning, MixedPrefix)):  # a prefix is read after tokens
        own = [next((one for one in of_row if isinstance(one, kind)), None) for of_row in learners]
        if any(one is not None for one in own):
            found.append(stands(own, bare, narrow, has_encoder))
    known = {id(one) for of_row in learners for one in of_row if isinstance(one, VirtualTokens | PrefixTuning)}
    if len(found) > 1 and found[0].feeds_decoder and (has_encoder or not found[0].takes_positions):
        raise RoutingError(
            "this model counts positions by itself, so rows with virtual tokens and rows with a prefix cannot stand in "
            "one batch; split it"
        )
    for one in found:
        one.in_cache = sum(each.count for each in found if each.feeds_decoder)
    if unknown := [one for of_row in learners for one in of_row if id(one) not in known]:
        raise RoutingError(f"{type(unknown[0]).__name__} cannot be a row's own prompt; route it for the whole batch")
    return found


def _numbers(learners: Learners) -> list[tuple[Any, list[int]]]:
    """[(learner, the compositions that have it)]"""
    return [
        (one, [number for number, other in enumerate(learners) if other is one])
        for one in {id(one): one for one in learners if one is not None}.values()
    ]


def _by_row(values: Sequence[Any], rows: int, device: torch.device) -> Tensor:
    """(B, 1) from a value for each composition."""
    return torch.tensor(values, device=device).repeat_interleave(rows // len(values))[:, None]


def _give_mask(model: nn.Module, inputs: dict[str, Any], side: str, in_cache: int) -> None:
    """The mask of a call that has none, because all of its text counts: what fills rows up must not. And, of a later
    call, the positions that the model would count for itself, filling included.

    side: "decoder_" for an encoder-decoder's decoder, else ""; in_cache: entries that the cache has besides the text.
    """
    text, cache = tokens_read(inputs, side), cache_of(model, inputs)
    past = 0 if is_empty(cache) else int(cache.get_seq_length()) - in_cache
    if mask_of(inputs, f"{side}attention_mask") is None:
        inputs[f"{side}attention_mask"] = _ones(text, past + text.shape[1])
    if past and inputs.get(f"{side}position_ids") is None and takes(model, f"{side}position_ids"):
        positions = past + torch.arange(text.shape[1], device=text.device)
        inputs[f"{side}position_ids"] = positions.expand(len(text), -1)


def _give_encoder_mask(inputs: dict[str, Any], count: int) -> None:
    """The same for an encoder, whose text has been read already where there is something to decode."""
    if mask_of(inputs, "attention_mask") is None:
        read = inputs.get("encoder_outputs")
        text = tokens_of(inputs) if read is None else read[0]
        inputs["attention_mask"] = _ones(text, text.shape[1] - (0 if read is None else count))


def _ones(rows: Tensor, length: int) -> Tensor:
    return torch.ones(len(rows), length, dtype=torch.long, device=rows.device)


class MixedTokens(VirtualTokens):
    """Virtual tokens, of each row its own."""

    in_cache: int
    """Entries that a decoder's cache has besides the text."""

    def __init__(self, learners: Learners, bare: Sequence[bool], narrow: Narrow, has_encoder: bool):
        nn.Module.__init__(self)
        first = next(one for one in learners if one is not None)
        self.__dict__["learners"] = learners  # they stay the model's own submodules
        self.bare, self.narrow, self.beside_encoder = bare, narrow, has_encoder
        self.width, self.is_causal, self.classifies_rows = first.width, first.is_causal, first.classifies_rows
        self.takes_positions = first.takes_positions
        self.count = max(one.count for one in learners if one is not None)
        self.parts = max(one.total // one.count for one in learners if one is not None)
        self.total = self.count * self.parts
        self.device = first.embedding.device
        self.prompts_decoder = any(one is not None and one.prompts_decoder for one in learners)
        self.feeds_decoder = not has_encoder or (self.prompts_decoder and self.parts > 1)

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if inputs.get("labels") is not None:
            for one, _ in _numbers(self.__dict__["learners"]):
                if type(one).after_forward is not PromptLearner.after_forward:
                    raise RoutingError(f"{type(one).__name__} has a loss of its own, so it cannot train in mixed rows")
        if is_encoder_decoder(model):
            _give_encoder_mask(inputs, self.count)
        if not is_encoder_decoder(model) or self.feeds_decoder:
            _give_mask(model, inputs, "decoder_" if is_encoder_decoder(model) else "", self.in_cache)
        super().before_forward(model, inputs)

    def missing(self, rows: int, decoder: bool = False) -> Tensor:
        learners = self.__dict__["learners"]
        own = [one.count if one is not None and (one.prompts_decoder or not decoder) else 0 for one in learners]
        return self.count - _by_row(own, rows, self.device)

    def place(self, mask: Tensor | None, rows: int, all_pads_first: bool = False, decoder: bool = False) -> Placement:
        behind = not self.is_causal or (self.beside_encoder and not decoder)  # positions count from the first token
        return placement(mask, self.count, all_pads_first, self.missing(rows, decoder), behind)

    def first_positions(self, mask: Tensor, place: Placement) -> Tensor:
        """A row without any prompt is counted by the model itself, padding included."""
        own = torch.arange(mask.shape[1] - self.count, device=mask.device).expand(len(mask), -1)
        return torch.where(
            _by_row(self.bare, len(mask), mask.device), place.extend_positions(own), text_positions(mask)
        )

    def prompts(self, inputs: dict[str, Any], rows: int) -> Tensor:
        learners = self.__dict__["learners"]
        each = rows // len(learners)
        found: dict[int, Tensor] = {}
        for one, numbers in _numbers(learners):
            own = one.prompts({key: self.narrow(value, numbers) for key, value in inputs.items()}, each * len(numbers))
            parts = own.reshape(len(own), -1, one.count, self.width)  # of the encoder, of the decoder
            padded = F.pad(parts, (0, 0, self.count - one.count, 0, 0, self.parts - parts.shape[1]))
            found |= dict(zip(numbers, padded.flatten(1, 2).split(each), strict=True))
        none = next(iter(found.values())).new_zeros(each, self.total, self.width)
        return torch.cat([found.get(number, none) for number in range(len(learners))])


class MixedPrefix(PrefixTuning):
    """Prefixes, of each row its own."""

    in_cache: int
    """Entries that a decoder's cache has besides the text."""

    feeds_decoder = True

    def __init__(self, learners: Learners, bare: Sequence[bool], narrow: Narrow, has_encoder: bool):
        nn.Module.__init__(self)
        first = next(one for one in learners if one is not None)
        self.__dict__["learners"] = learners
        self.bare = bare
        self.shapes, self.is_causal, self.counts_text = first.shapes, first.is_causal, first.counts_text
        self.count = max(one.count for one in learners if one is not None)

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        _give_mask(model, inputs, "decoder_" if is_encoder_decoder(model) else "", self.in_cache)
        super().before_forward(model, inputs)

    @property
    def embedding(self) -> Tensor:  # type: ignore[override]
        """Where and of what type the prefixes are."""
        return next(one.embedding for one in self.__dict__["learners"] if one is not None)

    def missing(self, rows: int) -> Tensor:
        own = [0 if one is None else one.count for one in self.__dict__["learners"]]
        return self.count - _by_row(own, rows, self.embedding.device)

    def first_positions(self, mask: Tensor) -> Tensor:
        """A row without any prompt is counted by the model itself, padding included."""
        own = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
        return torch.where(_by_row(self.bare, len(mask), mask.device), own, text_positions(mask))

    def states(self, rows: int) -> Tensor:
        learners = self.__dict__["learners"]
        each = rows // len(learners)
        own = {id(one): F.pad(one.states(each), (0, 0, self.count - one.count, 0)) for one, _ in _numbers(learners)}
        none = torch.zeros_like(next(iter(own.values())))
        return torch.cat([none if one is None else own[id(one)] for one in learners], dim=1)
