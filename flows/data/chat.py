"""Chats as a model reads them: rendered by the tokenizer's template, with labels on the assistant's turns alone.

Which tokens are supervised comes from the template's own turns: the text up to a turn, with the prompt to generate
it, must be a prefix of the whole, and the character offsets of the tokens tell the turn's from the rest. Nothing is
found by searching for a marker. A turn's end-of-turn token is supervised, or the model would never learn to stop.
"""

import hashlib
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flows.data.examples import Message
from flows.errors import DataError

IGNORED = -100
"""The label of a token that is not supervised."""


@dataclass(frozen=True)
class Tokens:
    """One chat as the model reads it, up to the last supervised token, since nothing after it is learned.

    input_ids, labels: equally long; a label is the token's id, or -100 where it is not supervised.
    prompt_length: tokens before the last assistant turn's first. prompt: their text, up to and including the
    template's prompt for that turn. completion: that turn's content, without its end.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    prompt: str
    completion: str

    @property
    def id(self) -> str:
        """What the row is known by, from its text alone."""
        return hashlib.sha256(f"{self.prompt}\0{self.completion}".encode()).hexdigest()[:16]


class ChatTokenizer:
    """Renders, tokenises and labels chats by one tokenizer's template.

    Raises DataError if the template ends an assistant turn with no special token, or the tokenizer has no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} tells no offsets; give a base with a tokenizer.json")
        self.tokenizer = tokenizer
        self.end = end_of_turn(tokenizer)
        self.special = {str(token) for token in tokenizer.added_tokens_decoder.values()}

    def tokenize(self, messages: list[Message]) -> Tokens:
        """Raises DataError if the template rewrites earlier turns, or a content holds one of its special tokens."""
        self._refuse_special_tokens(messages)
        whole = render(self.tokenizer, messages)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels, first, last, prompt = [IGNORED] * len(ids), 0, 0, ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, end = self._turn(messages, index, whole)
            inside = [i for i, (a, _) in enumerate(offsets) if len(prompt) <= a < end]
            ends = [i for i in inside if ids[i] == self.end]
            if not ends:
                raise DataError(f"the chat template does not end turn {index + 1} as it ends others")
            first, last = inside[0], ends[-1]
            labels[first : last + 1] = ids[first : last + 1]
        if not last:
            raise DataError("no token of it is supervised, because it has no assistant turn")
        return Tokens(ids[: last + 1], labels[: last + 1], first, prompt, messages[-1]["content"])

    def shorten(self, messages: list[Message], limit: int) -> list[Message] | None:
        """The chat with its last user turn cut from the end until the whole fits into `limit` tokens.

        The completion and the template stay whole; None where they alone do not fit.
        """
        index = max(i for i, message in enumerate(messages) if message["role"] == "user")
        content = messages[index]["content"]
        offsets = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = len(offsets)
        while True:
            excess = len(self.tokenize(messages).input_ids) - limit
            if excess <= 0:
                return messages
            kept -= excess
            if kept <= 0:
                return None
            shorter = {"role": "user", "content": content[: offsets[kept - 1][1]]}
            messages = [*messages[:index], shorter, *messages[index + 1 :]]

    def _turn(self, messages: list[Message], index: int, whole: str) -> tuple[str, int]:
        """The text before the turn's content, and where in `whole` the turn ends."""
        prompt = render(self.tokenizer, messages[:index], generate=True)
        until = render(self.tokenizer, messages[: index + 1])
        if not (whole.startswith(prompt) and whole.startswith(until) and len(prompt) < len(until)):
            raise DataError(not_a_prefix(self.tokenizer))
        return prompt, len(until)

    def _refuse_special_tokens(self, messages: list[Message]) -> None:
        found = {token for token in self.special for message in messages if token in message["content"]}
        if found:
            raise DataError(
                f"its text holds {', '.join(sorted(found))}, which the model would read as the template's; remove it"
            )


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False) -> str:
    """The chat as text; `generate` ends it with the template's prompt for an assistant turn.

    Raises DataError if the template refuses the chat (some know no system turn).
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses a chat of {roles}: {error}") from error
    assert isinstance(text, str)
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the special token with which the chat template ends an assistant turn.

    Raises DataError where it uses none, because a model trained on such turns never stops.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    start = render(tokenizer, [question], generate=True) + answer["content"]
    whole = render(tokenizer, [question, answer])
    if not whole.startswith(start):
        raise DataError(not_a_prefix(tokenizer))
    for token in tokenizer(whole[len(start) :], add_special_tokens=False)["input_ids"]:
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
        "give the tokenizer one that only appends"
    )
