"""Encoders from an example to a tokenised row, one for each kind, and the columns of the Parquet files.

Every row has an id (digest of its text), a group, a slice and a weight. Lists hold token ids, or labels: the token id
of supervised tokens, -100 elsewhere. The labels of tagged words are indices of tags, at each word's first token.
"""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, Protocol

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from flows.data.chat import ChatTokenizer, Shown, end_token
from flows.data.examples import (
    AnyExample,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Retrieval,
    Tagged,
    Translation,
    UnpairedPreference,
)
from flows.data.tokens import (
    IGNORED,
    AnswerTokens,
    AnyTokens,
    PairTokens,
    RetrievalTokens,
    TagTokens,
    TargetTokens,
    TextTokens,
    Tokens,
)
from flows.errors import DataError
from flows.params import Data

Kind = Literal[
    "chat",
    "text",
    "preference",
    "unpaired_preference",
    "classification",
    "token_classification",
    "seq2seq",
    "retrieval",
]
_IDS = List(Value("int32"))
_TEXT = Value("string")
_ORIGIN = {"id": _TEXT, "group": _TEXT, "slice": _TEXT}
_WEIGHT = {"weight": Value("float32")}
_ANSWER = {
    **{"prompt": _TEXT, "completion": _TEXT, "prompt_length": Value("int32")},
    **{"input_ids": _IDS, "labels": _IDS},
}
_CHAT = Features(_ORIGIN | _ANSWER | _WEIGHT)
COLUMNS: dict[Kind, Features] = {
    "chat": _CHAT,
    "text": _CHAT,
    "preference": Features(
        _ORIGIN
        | {"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT, "prompt_length": Value("int32")}
        | {f"{side}_{part}": _IDS for side in ("chosen", "rejected") for part in ("input_ids", "labels")}
        | _WEIGHT
    ),
    "unpaired_preference": Features(_ORIGIN | _ANSWER | {"desirable": Value("bool")} | _WEIGHT),
    "classification": Features(
        _ORIGIN | {"text": _TEXT, "input_ids": _IDS, "label": Value("int32"), "label_name": _TEXT} | _WEIGHT
    ),
    "token_classification": Features(
        _ORIGIN | {"text": _TEXT, "tokens": List(_TEXT), "tags": _TEXT, "input_ids": _IDS, "labels": _IDS} | _WEIGHT
    ),
    "seq2seq": Features(
        _ORIGIN
        | {"prompt": _TEXT, "target": _TEXT, "prompt_length": Value("int32"), "input_ids": _IDS, "labels": _IDS}
        | _WEIGHT
    ),
    "retrieval": Features(
        _ORIGIN
        | {"query": _TEXT, "positive": _TEXT, "negatives": List(_TEXT)}
        | {"query_input_ids": _IDS, "positive_input_ids": _IDS, "negatives_input_ids": List(_IDS)}
        | _WEIGHT
    ),
}
"""{kind: columns of a split}"""
EXTRA = Features({"extra": _TEXT})
"""Column of the values of `data.extra_columns` as JSON, if there are any."""
MARGIN = Features({"margin": Value("float32")})
"""Column of the margins of preference pairs, with `data.margin_column`."""


class Encoder(Protocol):
    """Encoder of one kind of example."""

    def parts(self, example: Any, limit: int) -> list[AnyTokens] | None:
        """Return the rows of an example that is cut into several; None if an example is one row."""
        return None

    def encode(self, example: Any) -> AnyTokens:
        """Tokenise an example. Raises DataError if the example cannot be a row."""
        ...

    def shorten(self, example: Any, limit: int) -> AnyExample | None:
        """Return the example with its prompt or text cut to fit into `limit` tokens; None if that is impossible."""
        ...


class ChatEncoder(Encoder):
    """Chats with labels on the assistant's turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.chats = ChatTokenizer(tokenizer, data.supervise, _shown(data))

    def encode(self, example: Example) -> Tokens:
        """Tokenise a chat."""
        return self.chats.tokenize(example.messages, example.tools)

    def shorten(self, example: Example, limit: int) -> Example | None:
        """Return the chat with its last user turn cut to fit; None if impossible."""
        shorter = self.chats.shorten(example.messages, limit, example.tools)
        return None if shorter is None else replace(example, messages=shorter)


class PreferenceEncoder(Encoder):
    """Preference pairs; every assistant turn after the prompt is supervised in both answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: Shown = "all") -> None:
        self.chats = ChatTokenizer(tokenizer, reasoning=reasoning)

    def encode(self, example: Preference) -> PairTokens:
        """Tokenise both answers after the shared prompt."""
        since = len(example.prompt)
        answers = (example.chosen, example.rejected)
        one, other = (self.chats.tokenize([*example.prompt, *turns], example.tools, since) for turns in answers)
        start = _first_supervised(one)
        if one.input_ids[:start] != other.input_ids[: _first_supervised(other)]:
            raise DataError(
                "the chat template writes the prompt differently before chosen and before rejected; give "
                "data.chat_template one whose prompt does not depend on the answer"
            )
        decode = self.chats.tokenizer.decode
        prompt, chosen, rejected = (
            str(decode(ids)) for ids in (one.input_ids[:start], one.input_ids[start:-1], other.input_ids[start:-1])
        )
        sides = [(side.input_ids, side.labels) for side in (one, other)]
        return PairTokens(prompt, chosen.strip(), rejected.strip(), start, sides, example.margin)

    def shorten(self, example: Preference, limit: int) -> Preference | None:
        """Return the pair with its prompt cut so that the longer answer fits; None if impossible."""
        longer = max((example.chosen, example.rejected), key=lambda turns: self._length(example, turns))
        end = len(example.prompt)
        shorter = self.chats.shorten([*example.prompt, *longer], limit, example.tools, before=end)
        return None if shorter is None else replace(example, prompt=shorter[:end])

    def _length(self, example: Preference, turns: list[Message]) -> int:
        return len(self.chats.tokenize([*example.prompt, *turns], example.tools).input_ids)


class UnpairedPreferenceEncoder(Encoder):
    """Answers with a mark; every assistant turn after the prompt is supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reasoning: Shown = "all") -> None:
        self.chats = ChatTokenizer(tokenizer, reasoning=reasoning)

    def encode(self, example: UnpairedPreference) -> AnswerTokens:
        """Tokenise a prompt with its answer."""
        turns = [*example.prompt, *example.completion]
        tokens = self.chats.tokenize(turns, example.tools, len(example.prompt))
        start, decode = _first_supervised(tokens), self.chats.tokenizer.decode
        prompt, completion = (str(decode(ids)) for ids in (tokens.input_ids[:start], tokens.input_ids[start:-1]))
        return AnswerTokens(tokens.input_ids, tokens.labels, start, prompt, completion.strip(), example.desirable)

    def shorten(self, example: UnpairedPreference, limit: int) -> UnpairedPreference | None:
        """Return the example with its prompt cut to fit; None if impossible."""
        end = len(example.prompt)
        turns = [*example.prompt, *example.completion]
        shorter = self.chats.shorten(turns, limit, example.tools, before=end)
        return None if shorter is None else replace(example, prompt=shorter[:end])


class LabelledEncoder(Encoder):
    """Texts, tokenised for a classifier with the tokenizer's own special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> None:
        if len(names) < 2:
            raise DataError(f"all rows have the label {names[0]!r}; give rows of at least two labels")
        self.tokenizer = tokenizer
        self.special = tokenizer.all_special_tokens
        self.numbers = {name: number for number, name in enumerate(names)}

    def encode(self, example: Labelled) -> TextTokens:
        """Tokenise a text."""
        tokens = [token for token in self.special if token in example.text]
        if tokens:
            raise DataError(f"its text holds {', '.join(tokens)}, which the model reads as a special token; remove it")
        ids = self.tokenizer(example.text)["input_ids"]
        assert isinstance(ids, list)
        if not ids:
            raise DataError("its text has no tokens; give it text, or remove the row")
        return TextTokens(example.text, ids, self.numbers[example.label], example.label)

    def shorten(self, example: Labelled, limit: int) -> Labelled | None:
        """Return the text cut to fit; None if impossible."""
        offsets = self.tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        length = len(offsets)
        while True:
            excess = len(self.encode(example).input_ids) - limit
            if excess <= 0:
                return example
            length -= excess
            if length <= 0:
                return None
            example = replace(example, text=example.text[: offsets[length - 1][1]])


class TaggedEncoder(Encoder):
    """Words with tags, tokenised as a text with the tokenizer's own special tokens.

    The words are joined by spaces, so that every tokenizer sees them as in a text. The class index of a tag is the
    label of the first token of its word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} has no offsets; give a base with a tokenizer.json")
        if len(names) < 2:
            raise DataError(f"all words have the tag {names[0]!r}; give rows with at least two tags")
        self.tokenizer = tokenizer
        self.special = tokenizer.all_special_tokens
        self.numbers = {name: number for number, name in enumerate(names)}

    def encode(self, example: Tagged) -> TagTokens:
        """Tokenise the words. Raises DataError if a word has no token of its own."""
        ids, words = self._tokenize(example.words)
        labels = [IGNORED] * len(ids)
        firsts = {word: position for position, word in reversed(list(enumerate(words))) if word is not None}
        for number, (word, tag) in enumerate(zip(example.words, example.tags, strict=True)):
            if number not in firsts:
                raise DataError(
                    f"its word {number}, {word!r:.80}, has no token of its own in the base's tokenizer; remove it, or "
                    "write it otherwise"
                )
            labels[firsts[number]] = self.numbers[tag]
        return TagTokens(example.words, example.tags, ids, labels)

    def shorten(self, example: Tagged, limit: int) -> Tagged | None:
        """Return the first words that fit, without the begin of an entity that does not; None if none fits."""
        _, words = self._tokenize(example.words)
        if len(words) <= limit:
            return example
        ends = next(number for number, word in enumerate(reversed(words)) if word is not None)  # special tokens
        begun = max((word for word in words[: max(0, limit - ends + 1)] if word is not None), default=0)
        for kept in range(min(begun + 1, len(example.words) - 1), 0, -1):
            if example.tags[kept].startswith("I-"):
                continue
            shorter = replace(example, words=example.words[:kept], tags=example.tags[:kept])
            if len(self._tokenize(shorter.words)[0]) <= limit:
                return shorter
        return None

    def _tokenize(self, words: list[str]) -> tuple[list[int], list[int | None]]:
        """Return the token ids, and the index of each token's word; None for tokens between words."""
        text = " ".join(words)
        if tokens := [token for token in self.special if token in text]:
            raise DataError(f"its words hold {', '.join(tokens)}, which the model reads as a special token; remove it")
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        assert isinstance(ids, list)
        ends = list(accumulate(len(word) + 1 for word in words))  # each with the space after it
        of_token: list[int | None] = []
        for start, stop in encoded["offset_mapping"]:
            word = bisect_right(ends, start)
            if (
                start < stop and word < len(words) and start == ends[word] - 1
            ):  # it begins with the space after the word
                word += 1
            begins = word < len(words) and ends[word] - 1 - len(words[word]) < stop
            of_token.append(word if start < stop and begins else None)
        return ids, of_token


class TranslationEncoder(Encoder):
    """Sources and targets, tokenised for an encoder-decoder with the tokenizer's own special tokens.

    A target ends with the end-of-sequence token. A limit is for either of the two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} has no offsets; give a base with a tokenizer.json")
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError("the tokenizer has no end-of-sequence token, so no target would end; give another base")
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def encode(self, example: Translation) -> TargetTokens:
        """Tokenise source and target."""
        sides: list[list[int]] = []
        texts = (("source", "text", example.text), ("target", "text_target", example.target))
        for name, argument, text in texts:
            if tokens := [token for token in self.special if token in text]:
                raise DataError(f"its {name} holds {', '.join(tokens)}, a special token of the model; remove it")
            arguments: dict[str, Any] = {argument: text}
            ids = self.tokenizer(**arguments)["input_ids"]
            assert isinstance(ids, list)
            if not ids:
                raise DataError(f"its {name} has no tokens; give it text, or remove the row")
            sides.append(ids)
        source, target = sides
        return TargetTokens(
            example.text, example.target, source, target if target[-1] == self.end else [*target, self.end]
        )

    def shorten(self, example: Translation, limit: int) -> Translation | None:
        """Return the row with its source cut to fit; None if that is impossible or the target is too long."""
        tokens = self.encode(example)
        if len(tokens.labels) > limit:
            return None
        offsets = self.tokenizer(example.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        length = len(offsets)
        while (excess := len(tokens.input_ids) - limit) > 0:
            length -= excess
            if length <= 0 or not (text := example.text[: offsets[length - 1][1]]).strip():
                return None
            example = replace(example, text=text)
            tokens = self.encode(example)
        return example


class RetrievalEncoder(Encoder):
    """Queries and passages, each tokenised as a text of its own with the tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = tokenizer.all_special_tokens

    def encode(self, example: Retrieval) -> RetrievalTokens:
        """Tokenise the texts of a row."""
        query, positive, *negatives = (self._ids(text) for text in self._texts(example))
        return RetrievalTokens(example.query, example.positive, list(example.negatives), query, positive, negatives)

    def shorten(self, example: Retrieval, limit: int) -> Retrieval | None:
        """Return the row with each longer text cut to fit; None if cutting makes the positive a negative."""
        query, positive, *negatives = (self._cut(text, limit) for text in self._texts(example))
        if positive in negatives or not (query and positive and all(negatives)):
            return None
        return replace(example, query=query, positive=positive, negatives=tuple(negatives))

    def _texts(self, example: Retrieval) -> list[str]:
        return [example.query, example.positive, *example.negatives]

    def _ids(self, text: str) -> list[int]:
        if tokens := [token for token in self.special if token in text]:
            raise DataError(f"a text holds {', '.join(tokens)}, which the model reads as a special token; remove it")
        ids = self.tokenizer(text)["input_ids"]
        assert isinstance(ids, list)
        if not ids:
            raise DataError(f"the text {text!r:.40} has no tokens; give it text, or remove the row")
        return ids

    def _cut(self, text: str, limit: int) -> str:
        """Return the beginning of a text that has at most `limit` tokens; "" if there is none."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        length = len(offsets)
        while (excess := len(self._ids(text)) - limit) > 0:
            length -= excess
            if length <= 0:
                return ""
            text = text[: offsets[length - 1][1]]
        return text


class DocumentEncoder(Encoder):
    """Plain texts, cut into rows of at most `max_length` tokens, all of them supervised.

    A text begins as the tokenizer begins one, and its last row ends with the token that ends a turn, or a text where
    there is no chat template. Evaluation continues the first half of a row, so this half is the row's prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} has no offsets; give a base with a tokenizer.json")
        self.tokenizer, self.end = tokenizer, end_token(tokenizer)
        self.special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def encode(self, example: Document) -> Tokens:
        """Tokenise a whole text as one row."""
        ids, offsets = self._tokenize(example.text)
        return self._row(example.text, ids, offsets, 0)

    def parts(self, example: Document, limit: int) -> list[AnyTokens]:
        """Return the rows of a text. A row never ends inside a character."""
        ids, offsets = self._tokenize(example.text)
        rows: list[AnyTokens] = []
        start = 0
        while start < len(ids):
            stop = min(start + limit, len(ids))
            if len(ids) - stop == 1:  # one token alone has no other to predict it from
                stop -= 1
            while start + 1 < stop < len(ids) and offsets[stop][0] < offsets[stop - 1][1]:
                stop -= 1
            rows.append(self._row(example.text, ids[start:stop], offsets[start:stop], offsets[start][0]))
            start = stop
        return rows

    def shorten(self, example: Document, limit: int) -> None:
        """Return None: a text is cut into rows, and never shortened."""
        return None

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the text's tokens with the end, and their character offsets."""
        if tokens := [token for token in self.special if token in text]:
            raise DataError(f"its text holds {', '.join(tokens)}, which the model reads as a special token; remove it")
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        assert isinstance(ids, list)
        while ids and offsets[-1][1] == 0:  # ends that the tokenizer adds
            ids, offsets = ids[:-1], offsets[:-1]
        if not ids:
            raise DataError("its text has no tokens; give it text, or remove the row")
        return [*ids, self.end], [*offsets, (len(text), len(text))]

    def _row(self, text: str, ids: list[int], offsets: list[tuple[int, int]], begin: int) -> Tokens:
        half = max(1, len(ids) // 2)
        while half > 1 and offsets[half][0] < offsets[half - 1][1]:
            half -= 1
        middle = offsets[half][0]
        return Tokens(ids, list(ids), half, text[begin:middle], text[middle : offsets[-1][1]])


def encoder_of(data: Data, tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> Encoder:
    """Return the encoder of `data.kind`. labels: names of all classes or tags."""
    if data.kind == "classification":
        return LabelledEncoder(tokenizer, labels)
    if data.kind == "token_classification":
        return TaggedEncoder(tokenizer, labels)
    if data.kind == "seq2seq":
        return TranslationEncoder(tokenizer)
    if data.kind == "text":
        return DocumentEncoder(tokenizer)
    if data.kind == "retrieval":
        return RetrievalEncoder(tokenizer)
    if data.kind == "preference":
        return PreferenceEncoder(tokenizer, _shown(data))
    if data.kind == "unpaired_preference":
        return UnpairedPreferenceEncoder(tokenizer, _shown(data))
    return ChatEncoder(tokenizer, data)


def label_names(examples: list[AnyExample]) -> list[str]:
    """Return the names of all classes or tags by index: as integers if all names are integers, else as text."""
    names = {example.label for example in examples if isinstance(example, Labelled)}
    names |= {tag for example in examples if isinstance(example, Tagged) for tag in example.tags}
    return sorted(names, key=_as_number if all(map(_is_number, names)) else None)


def _shown(data: Data) -> Shown:
    """Return the turns whose reasoning the template must show; with data.reasoning none, no turn has any."""
    return "all" if data.reasoning == "all" else "supervised"


def _first_supervised(tokens: Tokens) -> int:
    return next(i for i, label in enumerate(tokens.labels) if label != IGNORED)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _as_number(name: str) -> tuple[int, str]:
    return int(name), name  # 01 and 1 are two names
