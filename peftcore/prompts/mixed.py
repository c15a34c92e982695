"""Different prompts for the rows of one batch.

Each row computes the same as with its own prompt alone. Shorter prompts are extended by filler tokens (or filler cache
entries) that the attention mask excludes. Filler stands before the text, so that the text of a decoder ends at the last
position. It stands behind the text for models that count positions from the first token.

Shapes: B rows, N compositions of a route with B/N consecutive rows each, n length of the longest prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.errors import RoutingError
from peftcore.prompts.cache import cache_of, has_states, is_empty
from peftcore.prompts.key_value_prefix import KeyValuePrefix, tokens_read
from peftcore.prompts.learner import PromptLearner, accepts, is_encoder_decoder
from peftcore.prompts.placement import Placement, mask_of, placement, text_positions, tokens_of
from peftcore.prompts.virtual_tokens import VirtualTokens

Learners = Sequence[Any]
"""(N): the learner of each composition, or None."""
Narrow = Callable[[Any, list[int]], Any]
"""(argument of the call, indices of compositions) -> the argument for the rows of these compositions"""


def mixed_learners(
    learners: Sequence[Sequence[PromptLearner]], narrow: Narrow, has_encoder: bool
) -> list[PromptLearner]:
    """Return the learners that compute the prompts of a batch whose rows have different compositions.

    Args:
        learners: For each composition, its `exclusive` learners: their prompts are part of the model's input.
        narrow: A function that selects the rows of some compositions from one argument of the model's call.
        has_encoder: The model is an encoder-decoder.

    Returns:
        At most one learner for virtual tokens and one for prefixes, in this order.

    Raises:
        RoutingError: The model cannot have virtual tokens and prefixes in one batch, or a learner has another kind of
            prompt.
    """
    mixtures: list[Any] = []
    has_no_prompt = [not of_row for of_row in learners]
    for learner_class, mixture in ((VirtualTokens, MixedTokens), (KeyValuePrefix, MixedPrefix)):
        of_class = [next((each for each in of_row if isinstance(each, learner_class)), None) for of_row in learners]
        if any(learner is not None for learner in of_class):
            mixtures.append(mixture(of_class, has_no_prompt, narrow, has_encoder))
    if len(mixtures) > 1 and mixtures[0].feeds_decoder and (has_encoder or not mixtures[0].accepts_positions):
        raise RoutingError(
            "this model computes positions itself, so rows with virtual tokens and rows with a prefix cannot be in one "
            "batch; split the batch"
        )
    for mixture in mixtures:
        mixture.in_cache = sum(each.count for each in mixtures if each.feeds_decoder)
    for learner in (each for of_row in learners for each in of_row):
        if not isinstance(learner, VirtualTokens | KeyValuePrefix):
            raise RoutingError(f"{type(learner).__name__} cannot differ between rows; use it for the whole batch")
    return mixtures


def _with_indices(learners: Learners) -> list[tuple[Any, list[int]]]:
    """Return [(learner, indices of the compositions that have it)]."""
    return [
        (learner, [index for index, other in enumerate(learners) if other is learner])
        for learner in {id(each): each for each in learners if each is not None}.values()
    ]


def _by_row(values: Sequence[Any], rows: int, device: torch.device) -> Tensor:
    """Return (B, 1) for a value of each composition."""
    return torch.tensor(values, device=device).repeat_interleave(rows // len(values))[:, None]


def _add_mask(model: nn.Module, inputs: dict[str, Any], side: str, in_cache: int) -> None:
    """Add a mask of ones if the call has no mask, and positions to later calls without positions.

    The model would otherwise attend to filler and count filler.

    Args:
        model: The model.
        inputs: The call's arguments by name; changed in place.
        side: "decoder_" for the decoder of an encoder-decoder model, else "".
        in_cache: Number of cache entries that are not text.
    """
    text, cache = tokens_read(inputs, side), cache_of(model, inputs)
    if has_states(inputs, cache):
        return  # the filler is not in the states
    past = 0 if is_empty(cache) else int(cache.get_seq_length()) - in_cache
    if mask_of(inputs, f"{side}attention_mask") is None:
        inputs[f"{side}attention_mask"] = _ones(text, past + text.shape[1])
    if past and inputs.get(f"{side}position_ids") is None and accepts(model, f"{side}position_ids"):
        positions = past + torch.arange(text.shape[1], device=text.device)
        inputs[f"{side}position_ids"] = positions.expand(len(text), -1)


def _add_encoder_mask(inputs: dict[str, Any], count: int) -> None:
    """Add a mask of ones for the encoder's text; `encoder_outputs`, if given, include the prompt."""
    if mask_of(inputs, "attention_mask") is None:
        outputs = inputs.get("encoder_outputs")
        text = tokens_of(inputs) if outputs is None else outputs[0]
        inputs["attention_mask"] = _ones(text, text.shape[1] - (0 if outputs is None else count))


def _ones(rows: Tensor, length: int) -> Tensor:
    return torch.ones(len(rows), length, dtype=torch.long, device=rows.device)


class MixedTokens(VirtualTokens):
    """Virtual tokens that differ between the rows of a batch.

    Args:
        learners: The learner of each composition, or None.
        has_no_prompt: For each composition, True if it has neither virtual tokens nor a prefix.
        narrow: A function that selects the rows of some compositions from one argument of the model's call.
        has_encoder: The model is an encoder-decoder.
    """

    in_cache: int
    """Number of entries in the decoder's cache that are not text."""

    def __init__(self, learners: Learners, has_no_prompt: Sequence[bool], narrow: Narrow, has_encoder: bool):
        nn.Module.__init__(self)
        present = [learner for learner in learners if learner is not None]
        first = present[0]
        self.__dict__["learners"] = learners  # not registered: they are submodules of the model
        self.has_no_prompt, self.narrow, self.has_encoder_input = has_no_prompt, narrow, has_encoder
        self.width, self.is_causal, self.classifies_rows = first.width, first.is_causal, first.classifies_rows
        self.accepts_positions = first.accepts_positions
        self.count = max(learner.count for learner in present)
        self.parts = max(learner.total // learner.count for learner in present)
        self.total = self.count * self.parts
        self.device = first.vectors.device
        self.prompts_decoder = any(learner.prompts_decoder for learner in present)
        self.feeds_decoder = not has_encoder or (self.prompts_decoder and self.parts > 1)

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        if inputs.get("labels") is not None:
            for learner, _ in _with_indices(self.__dict__["learners"]):
                if type(learner).after_forward is not PromptLearner.after_forward:
                    raise RoutingError(
                        f"{type(learner).__name__} has its own loss, so it cannot train in mixed batches"
                    )
        if is_encoder_decoder(model):
            _add_encoder_mask(inputs, self.count)
        if not is_encoder_decoder(model) or self.feeds_decoder:
            _add_mask(model, inputs, "decoder_" if is_encoder_decoder(model) else "", self.in_cache)
        super().before_forward(model, inputs)

    def filler_count(self, rows: int, decoder: bool = False) -> Tensor:
        counts = [
            learner.count if learner is not None and (learner.prompts_decoder or not decoder) else 0
            for learner in self.__dict__["learners"]
        ]
        return self.count - _by_row(counts, rows, self.device)

    def place(self, mask: Tensor | None, rows: int, all_pads_first: bool = False, decoder: bool = False) -> Placement:
        counts_from_first_token = not self.is_causal or (self.has_encoder_input and not decoder)
        filler_count = self.filler_count(rows, decoder)
        return placement(mask, self.count, all_pads_first, filler_count, filler_behind=counts_from_first_token)

    def first_positions(self, mask: Tensor, place: Placement) -> Tensor:
        # a row without any prompt has the model's own positions, which count padding
        model_positions = torch.arange(mask.shape[1] - self.count, device=mask.device).expand(len(mask), -1)
        has_no_prompt = _by_row(self.has_no_prompt, len(mask), mask.device)
        return torch.where(has_no_prompt, place.extend_positions(model_positions), text_positions(mask))

    def prompts(self, inputs: dict[str, Any], rows: int) -> Tensor:
        learners = self.__dict__["learners"]
        each = rows // len(learners)
        prompts: dict[int, Tensor] = {}
        for learner, indices in _with_indices(learners):
            arguments = {key: self.narrow(value, indices) for key, value in inputs.items()}
            tokens = learner.prompts(arguments, each * len(indices))
            parts = tokens.reshape(len(tokens), -1, learner.count, self.width)  # one part for encoder and decoder each
            padded = F.pad(parts, (0, 0, self.count - learner.count, 0, 0, self.parts - parts.shape[1]))
            prompts |= dict(zip(indices, padded.flatten(1, 2).split(each), strict=True))
        filler = next(iter(prompts.values())).new_zeros(each, self.total, self.width)
        return torch.cat([prompts.get(index, filler) for index in range(len(learners))])


class MixedPrefix(KeyValuePrefix):
    """Prefixes that differ between the rows of a batch.

    Args:
        learners: The learner of each composition, or None.
        has_no_prompt: For each composition, True if it has neither virtual tokens nor a prefix.
        narrow: Not used; `MixedTokens` has the same arguments.
        has_encoder: Not used.
    """

    in_cache: int
    """Number of entries in the decoder's cache that are not text."""

    feeds_decoder = True

    def __init__(self, learners: Learners, has_no_prompt: Sequence[bool], narrow: Narrow, has_encoder: bool):
        nn.Module.__init__(self)
        first = next(learner for learner in learners if learner is not None)
        self.__dict__["learners"] = learners
        self.has_no_prompt = has_no_prompt
        self.shapes, self.is_causal, self.counts_text = first.shapes, first.is_causal, first.counts_text
        self.count = max(learner.count for learner in learners if learner is not None)

    def before_forward(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        _add_mask(model, inputs, "decoder_" if is_encoder_decoder(model) else "", self.in_cache)
        super().before_forward(model, inputs)

    @property
    def vectors(self) -> Tensor:
        """A prefix with the device and dtype of all prefixes."""
        return next(learner.vectors for learner in self.__dict__["learners"] if learner is not None)

    def filler_count(self, rows: int) -> Tensor:
        counts = [0 if learner is None else learner.count for learner in self.__dict__["learners"]]
        return self.count - _by_row(counts, rows, self.vectors.device)

    def first_positions(self, mask: Tensor) -> Tensor:
        # a row without any prompt has the model's own positions, which count padding
        model_positions = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
        has_no_prompt = _by_row(self.has_no_prompt, len(mask), mask.device)
        return torch.where(has_no_prompt, model_positions, text_positions(mask))

    def states(self, rows: int) -> Tensor:
        learners = self.__dict__["learners"]
        each = rows // len(learners)
        states = {
            id(learner): F.pad(learner.states(each), (0, 0, self.count - learner.count, 0))
            for learner, _ in _with_indices(learners)
        }
        filler = torch.zeros_like(next(iter(states.values())))
        return torch.cat([states.get(id(learner), filler) for learner in learners], dim=1)
