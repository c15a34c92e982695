"""Requests and responses of OpenAI's API. Fields that are not supported are refused, never ignored."""

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.generation import Finish
from peftcore.serving.sampling import TokenLogprobs
from peftcore.serving.text import UNFINISHED

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MOST_COMPLETIONS = 16
"""Largest `n` of a request (count)."""
StopText = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    """Base of request models: unknown fields and values of another type (such as "2" for 2) are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text part of a message; images and audio are not supported."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation.

    The chat template gets only role and text. Other fields of OpenAI's messages must be null or empty, as they are in
    an earlier response that OpenAI's client sends back.
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
        """Return the message for a chat template; the role developer becomes system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """Options of a streamed response; `include_usage` adds a last chunk with token counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class LoadRequest(_Strict):
    """Body of POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool | None = None
    """Replace an adapter of this name; its running requests keep the old one."""


class UnloadRequest(_Strict):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: None = None


class FeedbackRequest(_Strict):
    """Body of POST /v1/feedback: a rating of a recorded answer, a better answer, or both."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    """The response's `id`."""
    index: Annotated[int, Field(ge=0)] = 0
    """Number of the answer, if the request had `n`."""
    rating: Literal["up", "down"] | float | None = None
    correction: Annotated[str, Field(min_length=1, max_length=1_000_000)] | None = None
    """A better answer."""
    comment: Annotated[str, Field(max_length=10_000)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    """Who rates; null: the user of the request."""

    @property
    def score(self) -> float | None:
        """The rating from 0 (bad) to 1 (good). Raise BadRequestError if it is out of range, or nothing is given."""
        if self.rating is None:
            if not (self.correction or "").strip():
                raise BadRequestError("give a rating or a correction", "rating")
            return None
        score = {"up": 1.0, "down": 0.0}[self.rating] if isinstance(self.rating, str) else self.rating
        if not 0 <= score <= 1:
            raise BadRequestError(
                f"rating: give up, down, or a number from 0 (bad) to 1 (good), got {score:g}", "rating"
            )
        return score


class GenerationRequest(_Strict):
    """Fields that completion and chat requests share; a field of type `Literal` accepts that value only."""

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
    n: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the completion."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def requested_tokens(self) -> int | None:
        """Most tokens of the completion that the request asks for (count), or None."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Likeliest tokens to report beside each token (count); None: no log-probability is reported."""
        raise NotImplementedError

    def biases(self, vocabulary: int) -> dict[int, float]:
        """Return `logit_bias` by token id.

        Args:
            vocabulary: Number of tokens.

        Raises:
            BadRequestError: A key is not the id of a token.
        """
        for key in self.logit_bias or ():
            if not (key.isascii() and key.isdigit() and int(key) < vocabulary):
                raise BadRequestError(
                    f"logit_bias: {key!r:.40} is not a token id; the vocabulary has {vocabulary} tokens", "logit_bias"
                )
        return {int(key): value for key, value in (self.logit_bias or {}).items()}

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """Return the prompt as token ids. Raise BadRequestError if it is invalid."""
        raise NotImplementedError

    def prompt_record(self, tokenizer: Any) -> dict[str, Any]:
        """Return the prompt as text for a record: {"messages": [...]} or {"prompt": text}."""
        raise NotImplementedError

    def logprobs_object(self, tokenizer: Any, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Return the field `logprobs` of a choice.

        Args:
            tokenizer: Decodes the tokens.
            tokens: Tokens of the choice, in their order.
            offset: Characters of the completion before them (count).
        """
        raise NotImplementedError

    def choice(self, index: int, text: str, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a complete response."""
        raise NotImplementedError

    def chunk(self, index: int, text: str | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk. text None: the first chunk, which has no text."""
        raise NotImplementedError

    def envelope(self, streamed: bool) -> dict[str, Any]:
        """Return the fields that all chunks of a response share."""
        kind = self.chunk_kind if streamed else self.kind
        identity = f"{self.prefix}-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.model}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None

    @property
    def requested_tokens(self) -> int | None:
        """Most tokens of the completion, from either field of OpenAI's API."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """`top_logprobs`, if `logprobs` is true. Raise BadRequestError if only the former is given."""
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs; set logprobs to true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """Return the prompt as token ids. Raise BadRequestError if it is invalid."""
        if not tokenizer.chat_template:
            raise BadRequestError("the base model has no chat template; use /v1/completions")
        messages = [message.plain() for message in self.messages]
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if special_tokens := sorted(
            token for token in control if any(token in t for one in messages for t in one.values())
        ):
            raise BadRequestError(
                f"a message contains {', '.join(special_tokens)}, which the model would read as part of the chat "
                "template; remove it, or send the whole text to /v1/completions",
                "messages",
            )
        try:
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise BadRequestError(f"the chat template rejects these messages: {error}", "messages") from error
        return list(rendered["input_ids"])

    def prompt_record(self, tokenizer: Any) -> dict[str, Any]:
        """Return the messages, each with role and text."""
        return {"messages": [message.plain() for message in self.messages]}

    def logprobs_object(self, tokenizer: Any, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Return the field `logprobs` of a choice."""

        def described(token: int, logprob: float) -> dict[str, Any]:
            text, is_whole = _token_text(tokenizer, token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

        content = [
            {**described(one.token, one.logprob), "top_logprobs": [described(*pair) for pair in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def choice(self, index: int, text: str, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a complete response."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, text: str | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk."""
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    DEFAULT_TOKENS: ClassVar[int] = 16
    """OpenAI's default of max_tokens."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: None = None

    @property
    def requested_tokens(self) -> int:
        """Most tokens of the completion; OpenAI's default is 16."""
        return self.max_tokens or self.DEFAULT_TOKENS

    @property
    def wanted_logprobs(self) -> int | None:
        """`logprobs`."""
        return self.logprobs

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """Return the prompt as token ids. Raise BadRequestError if it is invalid."""
        if isinstance(self.prompt, str):
            return list(tokenizer(self.prompt)["input_ids"])
        if self.prompt and isinstance(self.prompt[0], str):
            return list(tokenizer(self.prompt[0])["input_ids"])
        tokens = [token for token in self.prompt if isinstance(token, int)]
        if wrong := [token for token in tokens if not 0 <= token < len(tokenizer)]:
            raise BadRequestError(
                f"prompt: {wrong[0]} is not a token id; the vocabulary has {len(tokenizer)} tokens", "prompt"
            )
        return tokens

    def prompt_record(self, tokenizer: Any) -> dict[str, Any]:
        """Return the text of the prompt."""
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0] if self.prompt else ""
        return {"prompt": text if isinstance(text, str) else tokenizer.decode(self.prompt_tokens(tokenizer))}

    def logprobs_object(self, tokenizer: Any, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Return the field `logprobs` of a choice."""
        texts = [_token_text(tokenizer, one.token)[0] for one in tokens]
        lengths = itertools.accumulate((len(text) for text in texts[:-1]), initial=offset)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{_token_text(tokenizer, token)[0]: value for token, value in one.top} for one in tokens],
            "text_offset": list(lengths),
        }

    def choice(self, index: int, text: str, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a complete response."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, text: str | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk."""
        return self.choice(index, text or "", finish, logprobs)


def _token_text(tokenizer: Any, token: int) -> tuple[str, bool]:
    """Return a token's text and True; for a part of a character, which has no text, its name in the vocabulary."""
    text = tokenizer.decode([token])
    return (text, True) if UNFINISHED not in text else (tokenizer.convert_ids_to_tokens(token), False)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def refusal(errors: Sequence[Mapping[str, Any]]) -> BadRequestError:
    """Return the first error of a validation, as an error for the client."""
    # for a field with several types, prefer the error about the value over errors about the other types
    first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0] if place else None
    named = ".".join(place[:3] if param == "messages" else place[:1]) or "request"
    problem = "unknown field" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r:.100}"
    if first["type"] == "none_required":
        problem = f"not supported, got {first['input']!r:.100}; remove it"
    return BadRequestError(f"{named}: {problem}", param)
