"""Sampling of the next token. Each request has its own random generator, so other requests do not change its tokens.

Shapes: B rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftcore.serving.grammar import TokenMatcher

ZERO_TEMPERATURE = 1e-6
"""Temperatures up to this value mean greedy decoding; logits divided by them would overflow."""


@dataclass(frozen=True)
class Sampling:
    """Sampling options of a request."""

    max_tokens: int
    """Most tokens to generate (count)."""
    temperature: float = 1.0
    """0: greedy decoding."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this total probability."""
    seed: int | None = None
    """Seed of the random generator. None: a random seed."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the completion has already."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the completion has the token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """{token id: value added to its logit}"""
    logprobs: int | None = None
    """Report each token's log-probability and those of so many likeliest tokens. None: report none."""

    def generator(self) -> torch.Generator:
        """Return a new random generator for this request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % 2**63)
        return generator


class SampledRow(NamedTuple):
    """Sampling options and state of one request; with the logits they determine its next token."""

    sampling: Sampling
    generator: torch.Generator
    counts: Counter[int]
    """{token: how often the completion has it}"""
    matcher: "TokenMatcher | None" = None
    """State in the grammar of the completion, if it has one."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the model's softmax, before grammar, temperature, penalties and biases."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens with their values, the likeliest first."""


def next_tokens(logits: Tensor, rows: Sequence[SampledRow], allowed: Mapping[int, Tensor] | None = None) -> list[int]:
    """Return the next token of each row of logits (B, V).

    Args:
        logits: The model's logits (B, V).
        rows: Sampling options and state of each row.
        allowed: {row: mask (V,) of the tokens that its grammar allows}; other rows are not constrained.
    """
    logits = logits.float()
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator, counts, _) in enumerate(rows):
        values, changed = logits[row], False
        if allowed and row in allowed:
            values, changed = values.masked_fill(~allowed[row].to(values.device), float("-inf")), True
        if (adjusted := _adjusted(values, sampling, counts)) is not None:
            values, changed = adjusted, True
        if sampling.temperature > ZERO_TEMPERATURE:
            tokens[row] = _draw(values.cpu() / sampling.temperature, sampling.top_p, generator)
        elif changed:
            tokens[row] = int(values.argmax())
    return tokens


def token_logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """Return the log-probability of a token, and those of the `top` likeliest tokens, from its logits (V,)."""
    values = logits.float().log_softmax(-1)
    likeliest = values.topk(top)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return TokenLogprobs(token, float(values[token]), list(pairs))


def _adjusted(logits: Tensor, sampling: Sampling, counts: Mapping[int, int]) -> Tensor | None:
    """Return logits (V,) with penalties and biases; None if there are none."""
    changes = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in counts.items():
            penalty = sampling.presence_penalty + sampling.frequency_penalty * count
            changes[token] = changes.get(token, 0.0) - penalty
    if not changes:
        return None
    tokens = torch.tensor(list(changes), device=logits.device)
    return logits.index_add(0, tokens, torch.tensor(list(changes.values()), device=logits.device))


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from the softmax of logits (V,), restricted to the tokens within top_p."""
    probabilities = logits.softmax(-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    likely, words = probabilities.sort(descending=True, stable=True)
    likely[1:][(likely.cumsum(0) - likely)[1:] >= top_p] = 0  # a top_p that rounds to 0 keeps the likeliest token
    return int(words[torch.multinomial(likely, 1, generator=generator)])
