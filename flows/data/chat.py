"""Chats as a model reads them: rendered by the tokenizer's template, with labels on the assistant's turns alone.

Which tokens are supervised comes from the template's own turns: the text up to a turn, with the prompt to generate
it, must be a prefix of the whole, and the character offsets of the tokens tell the turn's from the rest. Nothing is
found by searching for a marker. A turn's end-of-turn token is supervised, or the model would never learn to stop.
"""

import itertools
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flows.data.examples import Message
from flows.data.tokens import IGNORED, Tokens
from flows.errors import DataError

Tools = list[dict[str, Any]] | None
"""Functions that a chat may call, as the template takes them."""


class ChatTokenizer:
    """Renders, tokenises and labels chats by one tokenizer's template.

    supervise: "all" of the assistant's turns, or the "last" alone; a turn with `train`: false is never.
    Raises DataError if the template ends an assistant turn with no special token, or the tokenizer has no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, supervise: Literal["all", "last"] = "all") -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} tells no offsets; give a base with a tokenizer.json")
        self.tokenizer = tokenizer
        self.supervise = supervise
        self.end = end_of_turn(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {str(token) for number, token in added.items() if token.special or number == self.end}

    def tokenize(self, messages: list[Message], tools: Tools = None, since: int = 0) -> Tokens:
        """The chat with labels on the turns that are learned; none before the turn `since` is.

        Raises DataError if the template rewrites earlier turns or leaves one out, if a content holds one of its
        special tokens, or if no turn is supervised.
        """
        self._refuse_special_tokens(messages, tools)
        whole = render(self.tokenizer, messages, tools=tools)
        self._refuse_unseen(messages, whole, tools)
        turns = [self._turn(messages, index, whole, tools) for index in self._supervised(messages, since)]
        if not turns:
            raise DataError("no token of it is supervised, because it has no assistant turn that is to be trained")
        ids, offsets = self._encode(whole, [start for start, _ in turns])
        labels, first, last = [IGNORED] * len(ids), 0, 0
        for start, stop in turns:
            inside = [i for i, (a, _) in enumerate(offsets) if start <= a < stop]
            ends = [i for i in inside if ids[i] == self.end]
            if not ends:
                raise DataError("the chat template does not end one of its assistant turns as it ends others")
            first, last = inside[0], ends[-1]
            labels[first : last + 1] = ids[first : last + 1]
        start = turns[-1][0]
        completion = whole[start : offsets[last][0]].strip()
        return Tokens(ids[: last + 1], labels[: last + 1], first, whole[:start], completion)

    def shorten(
        self, messages: list[Message], limit: int, tools: Tools = None, before: int | None = None
    ) -> list[Message] | None:
        """The chat with its last user turn (of those before the turn `before`) cut from the end until the whole fits
        into `limit` tokens.

        The completion and the template stay whole; None where they alone do not fit.
        """
        index = max(i for i, message in enumerate(messages[:before]) if message["role"] == "user")
        content = messages[index]["content"]
        offsets = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = len(offsets)
        while True:
            excess = len(self.tokenize(messages, tools).input_ids) - limit
            if excess <= 0:
                return messages
            kept -= excess
            if kept <= 0:
                return None
            shorter = {"role": "user", "content": content[: offsets[kept - 1][1]]}
            messages = [*messages[:index], shorter, *messages[index + 1 :]]

    def _supervised(self, messages: list[Message], since: int) -> list[int]:
        turns = [i for i, message in enumerate(messages) if i >= since and message["role"] == "assistant"]
        considered = turns if self.supervise == "all" else turns[-1:]
        return [i for i in considered if messages[i].get("train", True)]

    def _turn(self, messages: list[Message], index: int, whole: str, tools: Tools) -> tuple[int, int]:
        """Where in `whole` the turn's content starts, and where the turn ends."""
        prompt = render(self.tokenizer, messages[:index], generate=True, tools=tools)
        until = render(self.tokenizer, messages[: index + 1], tools=tools)
        if not (whole.startswith(prompt) and whole.startswith(until) and len(prompt) < len(until)):
            raise DataError(not_a_prefix(self.tokenizer))
        return len(prompt), len(until)

    def _encode(self, text: str, starts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and their character offsets.

        Where the tokenizer would join the end of a prompt with the answer's start, the two are tokenised apart, as
        they are when an answer is generated.
        """
        ids, offsets = self._encode_piece(text, 0)
        inner = {character for a, b in offsets for character in range(a + 1, b)}
        cuts = [0, *(start for start in starts if start in inner), len(text)]
        if len(cuts) == 2:
            return ids, offsets
        pieces = [self._encode_piece(text[a:b], a) for a, b in itertools.pairwise(cuts)]
        return [i for ids, _ in pieces for i in ids], [o for _, offsets in pieces for o in offsets]

    def _encode_piece(self, text: str, at: int) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [(a + at, b + at) for a, b in encoded["offset_mapping"]]

    def _refuse_special_tokens(self, messages: list[Message], tools: Tools) -> None:
        texts = [text for message in messages for key in message if key != "role" for text in _texts(message[key])]
        texts += _texts(tools)
        found = {token for token in self.special for text in texts if token in text}
        if found:
            raise DataError(
                f"its text holds {', '.join(sorted(found))}, which the model would read as the template's; remove it"
            )

    def _refuse_unseen(self, messages: list[Message], whole: str, tools: Tools) -> None:
        """Templates that know nothing of tools leave them out in silence."""
        if tools and whole == render(self.tokenizer, messages):
            raise DataError("the chat template shows no tools; take a base whose template does, or remove them")
        for index, message in enumerate(messages):
            if message["role"] == "tool":
                without, what = {**message, "content": ""}, "the result of a tool"
            elif "tool_calls" in message:
                without, what = {"role": "assistant", "content": message["content"]}, "the tool calls"
            else:
                continue
            if whole == render(self.tokenizer, [*messages[:index], without, *messages[index + 1 :]], tools=tools):
                raise DataError(f"the chat template leaves out {what} in turn {index + 1}; take a base that shows it")


def _texts(value: Any) -> list[str]:
    """All text inside of JSON's types."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False, tools: Tools = None
) -> str:
    """The chat as text; `generate` ends it with the template's prompt for an assistant turn.

    The template is the base's own and runs in transformers' sandbox, from which it reaches neither files nor code; what
    a row holds is text to it, never a template. Raises DataError if the template refuses the chat (some know no system
    turn) or fails on it.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)  # pyright: ignore[reportArgumentType]
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses a chat of {roles}: {error}") from error
    assert isinstance(text, str)
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the special token with which the chat template ends an assistant turn.

    Raises DataError where it uses none, because a model trained on such turns never stops.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "Xyz9"}
    start = render(tokenizer, [question], generate=True)
    whole = render(tokenizer, [question, answer])
    if not whole.startswith(start):
        raise DataError(not_a_prefix(tokenizer))
    end = whole[len(start) :].rpartition(answer["content"])[2]
    for token in tokenizer(end, add_special_tokens=False)["input_ids"]:
        if token in tokenizer.added_tokens_decoder:
            return token
    raise DataError(
        "the chat template ends an assistant turn with no special token, so a model trained on it would never "
        "stop; add the end-of-sequence token to the template"
    )


def not_a_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a template that rewrites turns cannot be used, naming it."""
    head = str(tokenizer.chat_template).strip().splitlines()[0][:80]
    return (
        "the chat template rewrites a turn when more follows, so what the assistant wrote cannot be told from the "
        f"rest: the text with the prompt to generate is no prefix of the whole chat. The template begins {head!r}; "
        "give the tokenizer one that only appends, or, where it rewrites earlier turns alone (some strip the reasoning "
        "in <think>), learn the last answer alone with data.supervise: last"
    )
