"""Chats as token ids: rendered by the tokenizer's chat template, with labels on the assistant's turns only.

The template decides which tokens are supervised. The rendered text before a turn, with the generation prompt, must be a
prefix of the whole rendered chat. The turn begins where this prefix ends, and the tokens' character offsets locate the
turn's tokens. No marker text is searched for. A turn's end-of-turn token is supervised too, because the model would
otherwise never learn to stop.
"""

import itertools
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flows.data.examples import REASONING_FIELD, Message
from flows.data.tokens import IGNORED, Tokens
from flows.data.turns import REASONING, close_to_known
from flows.errors import DataError

Tools = list[dict[str, Any]] | None
"""Functions that a chat may call, in the template's format."""
Shown = Literal["all", "supervised"]
"""Turns whose reasoning the template must show."""
_CHECKED_ELSEWHERE = ("role", "content", "train", "tool_calls", "tool_call_id")
"""Fields of a turn that are checked in another way, or, as `tool_call_id`, only repeat the order of the turns."""


class ChatTokenizer:
    """Renders, tokenises and labels chats with one tokenizer's template.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        supervise: "all" assistant turns, or the "last"; a turn with `train`: false is never supervised.
        reasoning: Turns whose reasoning the template must show: "all", or the "supervised" ones.

    Raises:
        DataError: The template ends an assistant turn without a special token, or the tokenizer gives no character
            offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        supervise: Literal["all", "last"] = "all",
        reasoning: Shown = "all",
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} has no offsets; give a base with a tokenizer.json")
        if not tokenizer.chat_template:
            raise DataError(
                "the base's tokenizer has no chat template; give data.chat_template, such as the path of a "
                "chat_template.jinja, or an instruction-tuned base"
            )
        self.tokenizer = tokenizer
        self.supervise, self.reasoning = supervise, reasoning
        self.end = end_of_turn(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = {str(token) for number, token in added.items() if token.special or number == self.end}

    def tokenize(self, messages: list[Message], tools: Tools = None, since: int = 0) -> Tokens:
        """Tokenise a chat and label its supervised turns.

        Args:
            messages: The chat.
            tools: Functions that the chat may call.
            since: Turns before this index are not supervised.

        Returns:
            The chat up to the end-of-turn token of its last supervised turn; later turns are cut off.

        Raises:
            DataError: The template refuses the chat, rewrites a turn, or leaves out tools, tool calls, a tool's
                result, reasoning or another field of a turn; the chat's text holds a special token of the template;
                or no turn is supervised.
        """
        messages = self._with_template_names(messages)
        self._refuse_special_tokens(messages, tools)
        whole = render(self.tokenizer, messages, tools=tools)
        self._refuse_unseen(messages, whole, tools, since)
        turns = [self._turn(messages, index, whole, tools) for index in self._supervised(messages, since)]
        if not turns:
            raise DataError("it has no assistant turn to train on; give it an answer, or remove the row")
        ids, offsets = self._encode(whole, [start for start, _ in turns])
        labels, first, last = [IGNORED] * len(ids), 0, 0
        for start, stop in turns:
            inside = [i for i, (a, _) in enumerate(offsets) if start <= a < stop]
            ends = [i for i in inside if ids[i] == self.end]
            if not ends:
                raise DataError(
                    f"the chat template ends one of its assistant turns without {self.tokenizer.decode([self.end])!r}; "
                    "give data.chat_template one that ends all of them alike"
                )
            first, last = inside[0], ends[-1]
            labels[first : last + 1] = ids[first : last + 1]
        start = turns[-1][0]
        completion = whole[start : offsets[last][0]].strip()
        return Tokens(ids[: last + 1], labels[: last + 1], first, whole[:start], completion)

    def shorten(
        self, messages: list[Message], limit: int, tools: Tools = None, before: int | None = None
    ) -> list[Message] | None:
        """Shorten the last user turn from its end until the chat fits into `limit` tokens.

        Args:
            messages: The chat.
            limit: Maximum tokens of the chat.
            tools: Functions that the chat may call.
            before: Only a turn before this index may be shortened; None allows every turn.

        Returns:
            The shorter chat; None if the other turns and the template alone do not fit.

        Raises:
            DataError: The chat cannot be tokenised (see `tokenize`).
        """
        index = max(i for i, message in enumerate(messages[:before]) if message["role"] == "user")
        content = messages[index]["content"]
        offsets = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        length = len(offsets)
        while True:
            excess = len(self.tokenize(messages, tools).input_ids) - limit
            if excess <= 0:
                return messages
            length -= excess
            if length <= 0:
                return None
            shorter = messages[index] | {"content": content[: offsets[length - 1][1]]}
            messages = [*messages[:index], shorter, *messages[index + 1 :]]

    def _supervised(self, messages: list[Message], since: int) -> list[int]:
        turns = [i for i, message in enumerate(messages) if i >= since and message["role"] == "assistant"]
        considered = turns if self.supervise == "all" else turns[-1:]
        return [i for i in considered if messages[i].get("train", True)]

    def _turn(self, messages: list[Message], index: int, whole: str, tools: Tools) -> tuple[int, int]:
        """Return the start of the turn's content in `whole`, and the end of the turn."""
        prompt = render(self.tokenizer, messages[:index], generate=True, tools=tools)
        is_last = index + 1 == len(messages)
        until = whole if is_last else render(self.tokenizer, messages[: index + 1], tools=tools)
        if not (whole.startswith(prompt) and whole.startswith(until) and len(prompt) < len(until)):
            raise DataError(not_a_prefix(self.tokenizer))
        return len(prompt), len(until)

    def _encode(self, text: str, starts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and their character offsets.

        If a token would span the end of a prompt and the start of an answer, prompt and answer are tokenised
        separately, as in generation.
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
        tokens = {token for token in self.special for text in texts if token in text}
        if tokens:
            raise DataError(
                f"its text holds {', '.join(sorted(tokens))}, which the model would read as the template's; remove it"
            )

    @cached_property
    def reasoning_name(self) -> str:
        """Name of the field from which the template takes a turn's reasoning; `reasoning_content` if it shows none."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        for name in REASONING:
            if "Xyz9" in render(self.tokenizer, [question, answer | {name: "Xyz9"}]):
                return name
        return REASONING_FIELD

    def _with_template_names(self, messages: list[Message]) -> list[Message]:
        """Return the chat with its reasoning under the template's name."""
        if not any(REASONING_FIELD in message for message in messages):
            return messages
        name = self.reasoning_name
        return [{name if key == REASONING_FIELD else key: turn[key] for key in turn} for turn in messages]

    def _refuse_unseen(self, messages: list[Message], whole: str, tools: Tools, since: int) -> None:
        """Raise DataError for what the template leaves out silently: tools, their results, or fields of a turn."""
        if tools and whole == render(self.tokenizer, messages):
            raise DataError("the chat template has no tools; use a base whose template has, or remove the tools")
        self._refuse_unseen_fields(messages, whole, tools, since)
        for index, message in enumerate(messages):
            if message["role"] == "tool":
                without, subject = {**message, "content": ""}, "the result of a tool"
            elif "tool_calls" in message:
                without, subject = {"role": "assistant", "content": message["content"]}, "the tool calls"
            else:
                continue
            if whole == render(self.tokenizer, [*messages[:index], without, *messages[index + 1 :]], tools=tools):
                raise DataError(f"the chat template leaves out {subject} in turn {index + 1}; use a base that shows it")

    def _refuse_unseen_fields(self, messages: list[Message], whole: str, tools: Tools, since: int) -> None:
        for index, message in enumerate(messages):
            for key in message:
                if key in _CHECKED_ELSEWHERE or (message["role"] == "tool" and key == "name"):
                    continue  # a tool's name is that of the tool call
                is_reasoning = key in REASONING
                if is_reasoning and self.reasoning == "supervised" and index not in self._supervised(messages, since):
                    continue
                without = {name: value for name, value in message.items() if name != key}
                rest = render(self.tokenizer, [*messages[:index], without, *messages[index + 1 :]], tools=tools)
                if whole != rest and (not is_reasoning or message[key].strip() in whole):
                    continue
                turn = f"turn {index + 1} ({message['role']})"
                if is_reasoning:
                    raise DataError(
                        f"the chat template leaves out the reasoning of {turn}; give data.chat_template one that "
                        "shows it, or leave reasoning out by data.reasoning: none"
                        + self._advice_on_reasoning(messages, since, index)
                    )
                raise DataError(
                    f"{turn} has {key}, which the chat template does not show; name it in data.ignored_fields to leave "
                    f"it out, or give data.chat_template one that shows it{close_to_known(key)}"
                )

    def _advice_on_reasoning(self, messages: list[Message], since: int, index: int) -> str:
        if self.supervise == "last" and index not in self._supervised(messages, since):
            return ", or of turns without a loss by data.reasoning: supervised"
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return "; for templates that show only the last answer's: data.supervise: last" if index < last else ""


def _texts(value: Any) -> list[str]:
    """Return all strings inside a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False, tools: Tools = None
) -> str:
    """Return the chat as text; `generate` appends the template's generation prompt.

    The template belongs to the base and runs in transformers' sandbox, without access to files or code. A row's content
    is data for the template, never a template.

    Raises:
        DataError: The template refuses the chat (some allow no system turn) or fails.
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
        raise DataError(
            f"the chat template refuses a chat of {roles}: {error}; give turns that it accepts, or another "
            "data.chat_template"
        ) from error
    assert isinstance(text, str)
    return text


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a turn, or a text if the tokenizer has no chat template.

    Raises:
        DataError: There is no such token.
    """
    if tokenizer.chat_template:
        return end_of_turn(tokenizer)
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("the tokenizer has neither a chat template nor an end-of-sequence token; give another base")
    return tokenizer.eos_token_id


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the special token with which the chat template ends an assistant turn.

    Raises:
        DataError: The template uses no such token; a model trained on such turns never stops.
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
    """Return the error message for a template that rewrites turns."""
    head = str(tokenizer.chat_template).strip().splitlines()[0][:80]
    return (
        "the chat template rewrites a turn when more turns follow, so the assistant's tokens cannot be located: the "
        f"text with the generation prompt is no prefix of the whole chat. The template begins {head!r}; give the "
        "tokenizer a template that only appends. If the template rewrites only earlier turns (some remove reasoning in "
        "<think>), train on the last answer alone with data.supervise: last"
    )
