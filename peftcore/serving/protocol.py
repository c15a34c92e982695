"""OpenAI's requests and answers, as far as they are served. What is not served is refused, never left out silently."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.generation import Finish

Zero = Annotated[float, Field(ge=0, le=0)]
StopText = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    """A part of a request. Unknown fields are refused, and so are values of another type, such as "2" for 2."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; pictures and sound are not served."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation.

    A chat template is given the role and the text alone. The other fields of OpenAI's messages may be present without
    a value, as OpenAI's client sends an earlier answer back; with a value they are refused.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as a chat template takes it; OpenAI's developer messages are system messages."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """include_usage: whether a last chunk holds the counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(_Strict):
    """What both kinds of request have. Fields of one value are those that would mean something else otherwise."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """What the request says of its answer's length (tokens); None: nothing."""
        return self.max_tokens

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """The prompt as token ids. Raises BadRequestError."""
        raise NotImplementedError

    def choice(self, text: str, finish: Finish | None) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        """A part of one; text None: the first, which has none yet."""
        raise NotImplementedError

    def envelope(self, streamed: bool) -> dict[str, Any]:
        """What is the same in every part of one answer."""
        kind = self.chunk_kind if streamed else self.kind
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.model}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        if not tokenizer.chat_template:
            raise BadRequestError("this base has no chat template; use /v1/completions")
        messages = [message.plain() for message in self.messages]
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if found := sorted(token for token in control if any(token in t for one in messages for t in one.values())):
            raise BadRequestError(
                f"a message holds {', '.join(found)}, which the model would read as the chat template's own; leave it "
                "out, or give the whole text to /v1/completions",
                "messages",
            )
        try:
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise BadRequestError(f"the chat template refuses these messages: {error}", "messages") from error
        return list(rendered["input_ids"])

    def choice(self, text: str, finish: Finish | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    DEFAULT_TOKENS: ClassVar[int] = 16
    """OpenAI's own, for a request that says nothing."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def wanted_tokens(self) -> int:
        return self.max_tokens or self.DEFAULT_TOKENS

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        if isinstance(self.prompt, str):
            return list(tokenizer(self.prompt)["input_ids"])
        if self.prompt and isinstance(self.prompt[0], str):
            return list(tokenizer(self.prompt[0])["input_ids"])
        tokens = [token for token in self.prompt if isinstance(token, int)]
        if wrong := [token for token in tokens if not 0 <= token < len(tokenizer)]:
            raise BadRequestError(f"prompt: {wrong[0]} is no token; there are {len(tokenizer)}", "prompt")
        return tokens

    def choice(self, text: str, finish: Finish | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def piece(self, text: str | None, finish: Finish | None) -> dict[str, Any]:
        return self.choice(text or "", finish)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def refusal(errors: Sequence[Mapping[str, Any]]) -> BadRequestError:
    """What a validation has found, as one error."""
    # of a field that may be of several types, the one that was given is wrong in its value
    first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0] if place else None
    named = ".".join(place[:3] if param == "messages" else place[:1]) or "request"
    said = "is not known here" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r:.100}"
    if first["type"] == "none_required":
        said = f"is not served here, got {first['input']!r:.100}; leave it out"
    return BadRequestError(f"{named}: {said}", param)
