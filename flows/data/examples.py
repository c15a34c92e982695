"""One example of any source: a chat whose last turn is the assistant's."""

from dataclasses import dataclass

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class Example:
    """messages: the chat. group: rows of one group stay in one split. slice: what evaluation reports by.

    where: the row's place in its source, for messages about it.
    """

    messages: list[Message]
    group: str
    slice: str
    where: str


def question_and_answer(prompt: str, completion: str, system_prompt: str | None) -> list[Message]:
    """A chat of one turn each."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return with_system_prompt(chat, system_prompt)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The chat, begun by the system prompt unless it has one of its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
