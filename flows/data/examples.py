"""One example of any source, by kind: a chat to learn from, two answers of which one is better, or a labelled text."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may also hold `tool_calls`, and
`train`: false where its turn is context only."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """group: rows of one group stay in one split. slice: what evaluation reports by.

    where: the row's place in its source, for messages about it. weight: of its loss, 1 for an ordinary row.
    """

    group: str
    slice: str
    where: str
    weight: float = 1.0


@dataclass(frozen=True)
class Example(Origin):
    """A chat whose last turn is the assistant's; tools: the functions it may call, as the template takes them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Preference(Origin):
    """A chat up to an answer, and two ways to go on, each ending with a turn of the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Labelled(Origin):
    """A text and the name of its class."""

    text: str
    label: str


AnyExample = Example | Preference | Labelled


def question_and_answer(prompt: str, completion: str, system_prompt: str | None) -> list[Message]:
    """A chat of one turn each."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return with_system_prompt(chat, system_prompt)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The chat, begun by the system prompt unless it has one of its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
