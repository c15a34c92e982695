"""Examples as token ids: a chat with labels, a preference pair, a marked answer, a labelled text, tags, or a query."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

IGNORED = -100
"""Label of a token that is not supervised."""
Sequence = tuple[list[int], list[int]]
"""Token ids and their labels, of equal length."""


class AnyTokens(Protocol):
    """Interface of all kinds of tokenised rows."""

    @property
    def id(self) -> str:
        """Digest of the row's text."""
        ...

    @property
    def question(self) -> str:
        """Prompt of a chat or a pair, or the text to classify; no two splits may share one."""
        ...

    @property
    def answer(self) -> str:
        """Text that the model is trained to produce."""
        ...

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row."""
        ...

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file, by name."""
        ...


@dataclass(frozen=True)
class Tokens:
    """One chat up to its last supervised token.

    input_ids, labels: of equal length; a label is the token's id, or -100 if the token is not supervised.
    prompt_length: tokens before the last supervised turn. prompt: their text, including the turn's generation prompt.
    completion: the last supervised turn's text, without its end.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    prompt: str
    completion: str

    @property
    def id(self) -> str:
        """Digest of the row's text."""
        return _identity(self.prompt, self.completion)

    @property
    def question(self) -> str:
        """Prompt or text."""
        return self.prompt

    @property
    def answer(self) -> str:
        """Text that the model is trained to produce."""
        return self.completion

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row."""
        return [(self.input_ids, self.labels)]

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        return vars(self)


@dataclass(frozen=True)
class PairTokens:
    """Two continuations of one prompt, whose tokens are the first `prompt_length` of both.

    prompt, chosen, rejected: texts; the answers are without their end. parts: chosen, then rejected. margin: by how
    much the chosen one is better; None without `data.margin_column`.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_length: int
    parts: list[Sequence]
    margin: float | None = None

    @property
    def id(self) -> str:
        """Digest of the row's text."""
        return _identity(self.prompt, self.chosen, self.rejected)

    @property
    def question(self) -> str:
        """Prompt or text."""
        return self.prompt

    @property
    def answer(self) -> str:
        """Text that the model is trained to produce."""
        return f"{self.chosen}\n{self.rejected}"

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        named = zip(("chosen", "rejected"), self.parts, strict=True)
        return vars(self) | {
            f"{side}_{name}": values for side, part in named for name, values in zip(PART, part, strict=True)
        }


@dataclass(frozen=True)
class AnswerTokens(Tokens):
    """A prompt with one answer, all of whose assistant turns are supervised; desirable: the answer is a good one."""

    desirable: bool

    @property
    def id(self) -> str:
        """Digest of the row's text and its mark."""
        return _identity(self.prompt, self.answer)

    @property
    def answer(self) -> str:
        """Text of the answer with its mark, so that an answer marked in both ways is no duplicate."""
        return f"{self.completion}\n{'desirable' if self.desirable else 'undesirable'}"


@dataclass(frozen=True)
class TextTokens:
    """A text with the index and the name of its class."""

    text: str
    input_ids: list[int]
    label: int
    label_name: str

    @property
    def id(self) -> str:
        """Digest of the row's text."""
        return _identity(self.text, self.label_name)

    @property
    def question(self) -> str:
        """Prompt or text."""
        return self.text

    @property
    def answer(self) -> str:
        """Text that the model is trained to produce."""
        return self.label_name

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row."""
        return [(self.input_ids, [IGNORED] * len(self.input_ids))]

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        return vars(self)


@dataclass(frozen=True)
class TagTokens:
    """Words with their tags. labels: the class index of a tag at its word's first token, IGNORED elsewhere."""

    words: list[str]
    tags: list[str]
    input_ids: list[int]
    labels: list[int]

    @property
    def id(self) -> str:
        """Digest of the row's words and tags."""
        return _identity(*self.words, "\n", *self.tags)

    @property
    def question(self) -> str:
        """Words, with spaces between them."""
        return " ".join(self.words)

    @property
    def answer(self) -> str:
        """Tags, with spaces between them; no tag holds a space."""
        return " ".join(self.tags)

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row."""
        return [(self.input_ids, self.labels)]

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        return {
            "text": self.question,
            "tokens": self.words,
            "tags": self.answer,
            "input_ids": self.input_ids,
            "labels": self.labels,
        }


@dataclass(frozen=True)
class TargetTokens:
    """A source and its target. labels: token ids of the target with its end."""

    prompt: str
    target: str
    input_ids: list[int]
    labels: list[int]

    @property
    def id(self) -> str:
        """Digest of the row's texts."""
        return _identity(self.prompt, self.target)

    @property
    def question(self) -> str:
        """Source text."""
        return self.prompt

    @property
    def answer(self) -> str:
        """Text that the model is trained to produce."""
        return self.target

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row: the source, then the target."""
        return [(self.input_ids, [IGNORED] * len(self.input_ids)), (self.labels, self.labels)]

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        return vars(self) | {"prompt_length": len(self.input_ids)}


@dataclass(frozen=True)
class RetrievalTokens:
    """A query with its passage and hard negatives: texts and token ids, each with the tokenizer's special tokens."""

    query: str
    positive: str
    negatives: list[str]
    query_input_ids: list[int]
    positive_input_ids: list[int]
    negatives_input_ids: list[list[int]]

    @property
    def id(self) -> str:
        """Digest of the row's texts."""
        return _identity(self.query, self.positive, *self.negatives)

    @property
    def question(self) -> str:
        """The query."""
        return self.query

    @property
    def answer(self) -> str:
        """The passages, the right one first."""
        return "\n".join([self.positive, *self.negatives])

    @property
    def parts(self) -> list[Sequence]:
        """Sequences of the row: query, positive, negatives."""
        texts = [self.query_input_ids, self.positive_input_ids, *self.negatives_input_ids]
        return [(ids, [IGNORED] * len(ids)) for ids in texts]

    def columns(self) -> dict[str, Any]:
        """Return the kind's own columns of the Parquet file."""
        return vars(self)


PART = ("input_ids", "labels")


def length(tokens: AnyTokens) -> int:
    """Return the tokens of the longest sequence."""
    return max(len(ids) for ids, _ in tokens.parts)


def _identity(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
