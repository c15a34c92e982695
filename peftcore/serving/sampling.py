"""Sampling of the next token. Each request has its own random generator, so other requests do not change its tokens.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def generator(self) -> torch.Generator:
        """Return a new random generator for this request."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % 2**63)
        return generator


def next_tokens(logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]) -> list[int]:
    """Return the next token of each row of logits (B, V)."""
    logits = logits.float()
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator) in enumerate(rows):
        if sampling.temperature > ZERO_TEMPERATURE:
            tokens[row] = _draw(logits[row].cpu() / sampling.temperature, sampling.top_p, generator)
    return tokens


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from the softmax of logits (V,), restricted to the tokens within top_p."""
    probabilities = logits.softmax(-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    likely, words = probabilities.sort(descending=True, stable=True)
    likely[likely.cumsum(0) - likely >= top_p] = 0
    return int(words[torch.multinomial(likely, 1, generator=generator)])
