"""An example as token ids: a chat with labels, a pair of answers to one prompt, or a text with its class."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

IGNORED = -100
"""The label of a token that is not supervised."""
Sequence = tuple[list[int], list[int]]
"""Token ids and their labels, equally long."""


class AnyTokens(Protocol):
    """What every kind of row tells of itself.

    id: what it is known by, from its text alone. question: what it asks; two splits may not share it. answer: what
    it teaches. parts: its sequences.
    """

    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def parts(self) -> list[Sequence]: ...
    def columns(self) -> dict[str, Any]:
        """Its own columns of the Parquet file, by name."""
        ...


@dataclass(frozen=True)
class Tokens:
    """One chat as the model reads it, up to the last supervised token, since nothing after it is learned.

    input_ids, labels: equally long; a label is the token's id, or -100 where it is not supervised.
    prompt_length: tokens before the last supervised turn's first. prompt: their text, up to and including the
    template's prompt for that turn. completion: what the template writes of that turn, without its end.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    prompt: str
    completion: str

    @property
    def id(self) -> str:
        return _identity(self.prompt, self.completion)

    @property
    def question(self) -> str:
        return self.prompt

    @property
    def answer(self) -> str:
        return self.completion

    @property
    def parts(self) -> list[Sequence]:
        return [(self.input_ids, self.labels)]

    def columns(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class PairTokens:
    """Two ways to go on from one prompt, whose tokens are the first `prompt_length` of both.

    prompt, chosen, rejected: texts; those of the answers are without their end. parts: chosen, then rejected.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_length: int
    parts: list[Sequence]

    @property
    def id(self) -> str:
        return _identity(self.prompt, self.chosen, self.rejected)

    @property
    def question(self) -> str:
        return self.prompt

    @property
    def answer(self) -> str:
        return f"{self.chosen}\n{self.rejected}"

    def columns(self) -> dict[str, Any]:
        named = zip(("chosen", "rejected"), self.parts, strict=True)
        return vars(self) | {
            f"{side}_{name}": values for side, part in named for name, values in zip(PART, part, strict=True)
        }


@dataclass(frozen=True)
class TextTokens:
    """A text with its class by number and by name."""

    text: str
    input_ids: list[int]
    label: int
    label_name: str

    @property
    def id(self) -> str:
        return _identity(self.text, self.label_name)

    @property
    def question(self) -> str:
        return self.text

    @property
    def answer(self) -> str:
        return self.label_name

    @property
    def parts(self) -> list[Sequence]:
        return [(self.input_ids, [IGNORED] * len(self.input_ids))]

    def columns(self) -> dict[str, Any]:
        return vars(self)


PART = ("input_ids", "labels")


def length(tokens: AnyTokens) -> int:
    """Tokens of its longest sequence."""
    return max(len(ids) for ids, _ in tokens.parts)


def _identity(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
