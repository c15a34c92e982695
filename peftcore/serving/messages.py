"""The messages of a chat request, and the prompt that the chat template makes of them."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.strict_model import StrictModel
from peftcore.serving.tool_formats import require_tools
from peftcore.serving.tools import Tool, ToolCall


class TextPart(StrictModel):
    """A text part of a message; images and audio are not supported."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """One turn of a conversation.

    Other fields of OpenAI's messages must be null or empty, as they are in an earlier response that OpenAI's client
    sends back.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def check(self, place: str) -> None:
        """Check that the fields fit the role.

        Args:
            place: Place of the message in the request, for errors.

        Raises:
            BadRequestError: A field is missing, or has no meaning for this role.
        """
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise BadRequestError(f"{place}.content: needed, unless an assistant message has tool_calls", "messages")
        if self.tool_calls and self.role != "assistant":
            raise BadRequestError(f"{place}.tool_calls: only for the role assistant, got {self.role}", "messages")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            needs = "needed for the role tool" if self.role == "tool" else f"only for the role tool, got {self.role}"
            raise BadRequestError(f"{place}.tool_call_id: {needs}", "messages")

    def plain(self, place: str = "messages.0") -> dict[str, Any]:
        """Return the message for a chat template; the role developer becomes system.

        Args:
            place: Place of the message in the request, for errors.

        Raises:
            BadRequestError: The arguments of a tool call are not a JSON object.
        """
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            calls = [call.plain(f"{place}.tool_calls.{number}") for number, call in enumerate(self.tool_calls)]
            message["tool_calls"] = calls
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def rendered_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Return the token ids of a conversation, to be continued by the assistant.

    Args:
        tokenizer: Has the chat template.
        messages: The conversation.
        tools: Tools that the template describes to the model.

    Raises:
        BadRequestError: A message is invalid, or the chat template rejects messages or tools.
    """
    if not tokenizer.chat_template:
        raise BadRequestError("the base model has no chat template; use /v1/completions")
    try:
        plain = _plain(messages)
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        _check_texts(tokenizer, plain, "messages")
        _check_texts(tokenizer, described, "tools")
        if any("tool_calls" in one for one in plain):
            require_tools(tokenizer.get_chat_template(tools=described or None), "tool_calls", "messages")
        rendered = tokenizer.apply_chat_template(
            plain, tools=described or None, add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:
        raise BadRequestError(f"the chat template rejects these messages: {error}", "messages") from error
    except RecursionError:
        raise BadRequestError("JSON in messages or tools is nested too deeply", "messages") from None
    return list(rendered["input_ids"])


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages for a chat template; answers of tools get the name of the function that was called."""
    names: dict[str, str] = {}
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        message.check(place)
        one = message.plain(place)
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise BadRequestError(
                    f"{place}.tool_call_id: no earlier message calls {message.tool_call_id!r:.80}", "messages"
                )
            one["name"] = names[message.tool_call_id]
        plain.append(one)
    return plain


def check_unicode(text: str, field: str) -> None:
    """Raise BadRequestError if a text contains half of a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(
            f"{field}: a text contains half of a surrogate pair, {text[error.start]!r}; send whole characters", field
        ) from error


def _check_texts(tokenizer: Any, values: Any, field: str) -> None:
    """Check the texts of a JSON value.

    Raises:
        BadRequestError: A text contains half of a surrogate pair, or a special token, which the model would read as the
            template's.
    """
    for text in _texts(values):
        check_unicode(text, field)
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special_tokens := sorted(token for token in control if any(token in text for text in _texts(values))):
        what = "a message" if field == "messages" else "a tool"
        raise BadRequestError(
            f"{what} contains {', '.join(special_tokens)}, which the model would read as part of the chat "
            "template; remove it, or send the whole text to /v1/completions",
            field,
        )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
