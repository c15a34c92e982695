"""From an example to the row that is written: one encoder a kind, and the columns of its Parquet files.

Every kind's row has an id (of its text), a group, a slice and a weight. Lists are of token ids, or of labels: the
token's id where it is supervised, -100 elsewhere.
"""

from dataclasses import replace
from typing import Any, Literal, Protocol

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer
from flows.data.examples import AnyExample, Example, Labelled, Message, Preference
from flows.data.tokens import IGNORED, AnyTokens, PairTokens, TextTokens, Tokens
from flows.errors import DataError
from flows.params import Data

Kind = Literal["chat", "preference", "classification"]
_IDS = List(Value("int32"))
_TEXT = Value("string")
_ORIGIN = {"id": _TEXT, "group": _TEXT, "slice": _TEXT}
_WEIGHT = {"weight": Value("float32")}
COLUMNS: dict[Kind, Features] = {
    "chat": Features(
        _ORIGIN
        | {"prompt": _TEXT, "completion": _TEXT, "prompt_length": Value("int32"), "input_ids": _IDS, "labels": _IDS}
        | _WEIGHT
    ),
    "preference": Features(
        _ORIGIN
        | {"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT, "prompt_length": Value("int32")}
        | {f"{side}_{part}": _IDS for side in ("chosen", "rejected") for part in ("input_ids", "labels")}
        | _WEIGHT
    ),
    "classification": Features(
        _ORIGIN | {"text": _TEXT, "input_ids": _IDS, "label": Value("int32"), "label_name": _TEXT} | _WEIGHT
    ),
}
"""{kind: the columns of a split}"""


class Encoder(Protocol):
    """What prepare needs of a kind."""

    def encode(self, example: Any) -> AnyTokens:
        """Raises DataError if the example cannot be a row."""
        ...

    def shorten(self, example: Any, limit: int) -> AnyExample | None:
        """The example with its question or text cut until it fits into `limit` tokens; None where nothing helps."""
        ...


class ChatEncoder:
    """Chats with labels on the assistant's turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.chats = ChatTokenizer(tokenizer, data.supervise)

    def encode(self, example: Example) -> Tokens:
        return self.chats.tokenize(example.messages, example.tools)

    def shorten(self, example: Example, limit: int) -> Example | None:
        shorter = self.chats.shorten(example.messages, limit, example.tools)
        return None if shorter is None else replace(example, messages=shorter)


class PreferenceEncoder:
    """Pairs of answers; every assistant turn after the prompt is supervised, in both."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.chats = ChatTokenizer(tokenizer)

    def encode(self, example: Preference) -> PairTokens:
        since = len(example.prompt)
        answers = (example.chosen, example.rejected)
        one, other = (self.chats.tokenize([*example.prompt, *turns], example.tools, since) for turns in answers)
        start = _first_supervised(one)
        if one.input_ids[:start] != other.input_ids[: _first_supervised(other)]:
            raise DataError("the chat template writes the prompt in two ways for chosen and rejected")
        decode = self.chats.tokenizer.decode
        prompt, chosen, rejected = (
            str(decode(ids)) for ids in (one.input_ids[:start], one.input_ids[start:-1], other.input_ids[start:-1])
        )
        sides = [(side.input_ids, side.labels) for side in (one, other)]
        return PairTokens(prompt, chosen.strip(), rejected.strip(), start, sides)

    def shorten(self, example: Preference, limit: int) -> Preference | None:
        longer = max((example.chosen, example.rejected), key=lambda turns: self._length(example, turns))
        end = len(example.prompt)
        shorter = self.chats.shorten([*example.prompt, *longer], limit, example.tools, before=end)
        return None if shorter is None else replace(example, prompt=shorter[:end])

    def _length(self, example: Preference, turns: list[Message]) -> int:
        return len(self.chats.tokenize([*example.prompt, *turns], example.tools).input_ids)


class LabelledEncoder:
    """Texts as the tokenizer makes them for a model that reads one text, with its own special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> None:
        if len(names) < 2:
            raise DataError(f"all rows have the label {names[0]!r}; a classifier needs two")
        self.tokenizer = tokenizer
        self.special = tokenizer.all_special_tokens
        self.numbers = {name: number for number, name in enumerate(names)}

    def encode(self, example: Labelled) -> TextTokens:
        found = [token for token in self.special if token in example.text]
        if found:
            raise DataError(f"its text holds {', '.join(found)}, which has a meaning to the model; remove it")
        ids = self.tokenizer(example.text)["input_ids"]
        assert isinstance(ids, list)
        if not ids:
            raise DataError("its text has no tokens")
        return TextTokens(example.text, ids, self.numbers[example.label], example.label)

    def shorten(self, example: Labelled, limit: int) -> Labelled | None:
        offsets = self.tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = len(offsets)
        while True:
            excess = len(self.encode(example).input_ids) - limit
            if excess <= 0:
                return example
            kept -= excess
            if kept <= 0:
                return None
            example = replace(example, text=example.text[: offsets[kept - 1][1]])


def encoder_of(data: Data, tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> Encoder:
    """The encoder of `data.kind`; labels: the names of all classes, of classification."""
    if data.kind == "classification":
        return LabelledEncoder(tokenizer, labels)
    return PreferenceEncoder(tokenizer) if data.kind == "preference" else ChatEncoder(tokenizer, data)


def label_names(examples: list[AnyExample]) -> list[str]:
    """The names of all classes in the order of their numbers: by value where all are whole numbers, else by name."""
    names = {example.label for example in examples if isinstance(example, Labelled)}
    return sorted(names, key=_as_number if all(map(_is_number, names)) else None)


def _first_supervised(tokens: Tokens) -> int:
    return next(i for i, label in enumerate(tokens.labels) if label != IGNORED)


def _is_number(name: str) -> bool:
    return name.lstrip("-").isdecimal()


def _as_number(name: str) -> Any:
    return int(name)
