"""One example of any source: a chat, a preference pair, an answer or text with a label, tags, a text, or a query."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant turn may also have `tool_calls`,
`reasoning_content`, and `train`: false if the turn is context only. Further fields are for the chat template."""
REASONING_FIELD = "reasoning_content"
"""Field of an assistant turn with the reasoning before its answer."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Group, slice, location, weight and source of an example.

    group: rows of one group stay in one split. slice: evaluation reports by slice. where: location in the source, for
    messages. weight: factor of the row's loss. extra: {column: value} as JSON, for scorers; None without such columns.
    source: name of the source in `data.mixture`; "" with one source.
    """

    group: str
    slice: str
    where: str
    weight: float = 1.0
    extra: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Example(Origin):
    """A chat that ends with an assistant turn; tools: functions that it may call, in the template's format."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Preference(Origin):
    """A chat up to an answer, and two continuations, each ending with an assistant turn.

    margin: by how much the chosen one is better; None without `data.margin_column`.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None


@dataclass(frozen=True)
class UnpairedPreference(Origin):
    """A chat up to an answer, and one continuation that ends with an assistant turn; desirable: it is a good one."""

    prompt: list[Message]
    completion: list[Message]
    desirable: bool
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Labelled(Origin):
    """A text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Tagged(Origin):
    """Words, with a tag for each."""

    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class Translation(Origin):
    """A source text, and the target text that follows from it: a translation, a summary or an answer."""

    text: str
    target: str


@dataclass(frozen=True)
class Document(Origin):
    """A text of which every token is learned."""

    text: str


@dataclass(frozen=True)
class Retrieval(Origin):
    """A query, a passage that answers it, and passages that do not, which may be none."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


AnyExample = Example | Preference | UnpairedPreference | Labelled | Tagged | Translation | Document | Retrieval


def question_and_answer(prompt: str, completion: str, system_prompt: str | None) -> list[Message]:
    """Return a chat of one user turn and one assistant turn."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return with_system_prompt(chat, system_prompt)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Return the chat with the system prompt first, unless the chat has its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
