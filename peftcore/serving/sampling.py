"""Which token comes next. Each request draws from a generator of its own, so others in the batch change nothing.

Shapes: B rows, v words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLD = 1e-6
"""Temperatures up to this are 0; logits divided by them would be infinite."""


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens. max_tokens: count; temperature 0: the likeliest; top_p: of the likeliest tokens
    that make up this probability; seed: of the generator, None for another one each time; stop: texts that end it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """A fresh one."""
        made = torch.Generator()
        if self.seed is None:
            made.seed()
        else:
            made.manual_seed(self.seed % 2**63)
        return made


def next_tokens(logits: Tensor, rows: Sequence[tuple[Sampling, torch.Generator]]) -> list[int]:
    """A token for each row of logits (B, v)."""
    logits = logits.float()
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator) in enumerate(rows):
        if sampling.temperature > COLD:
            tokens[row] = _draw(logits[row].cpu() / sampling.temperature, sampling.top_p, generator)
    return tokens


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> int:
    """One of v, by the softmax of logits (v,) without what lies beyond top_p."""
    probabilities = logits.softmax(-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    likely, words = probabilities.sort(descending=True, stable=True)
    likely[likely.cumsum(0) - likely >= top_p] = 0
    return int(words[torch.multinomial(likely, 1, generator=generator)])
