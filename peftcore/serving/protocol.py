"""Requests and responses of OpenAI's API. Fields that are not supported are refused, never ignored."""

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftcore.serving.errors import BadRequestError
from peftcore.serving.generation import Finish
from peftcore.serving.grammar import GrammarSpec
from peftcore.serving.messages import Message, check_unicode, rendered_prompt
from peftcore.serving.sampling import TokenLogprobs
from peftcore.serving.strict_model import StrictModel as _Strict
from peftcore.serving.structured_output import Choices, ResponseFormat, StructuredOutputs, vllm_grammars
from peftcore.serving.text import UNFINISHED
from peftcore.serving.tool_call_stream import ParsedCall
from peftcore.serving.tool_calling import ToolCalling
from peftcore.serving.tool_formats import ToolFormat
from peftcore.serving.tools import Tool, ToolChoice, callable_functions

Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MOST_COMPLETIONS = 16
"""Largest `n` of a request (count)."""
LONGEST_ID = 18
"""Most digits of a token id (count)."""
NESTED = ("messages", "tools", "response_format", "structured_outputs")
"""Fields with fields of their own, which errors name."""
Delta = str | dict[str, Any]
"""The next part of an answer: text, or OpenAI's `delta` with text or tool calls."""
StopText = Annotated[str, Field(min_length=1)]


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
    continues_prompt: ClassVar[bool] = False
    """True if the completion continues the text of the prompt."""

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
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

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

    def grammars(self) -> list[GrammarSpec]:
        """Return the grammars that the fields ask for. Raise BadRequestError if a field is invalid."""
        fields = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        whitespace = self.guided_whitespace_pattern
        if whitespace is not None and self.guided_json is None:
            raise BadRequestError("guided_whitespace_pattern needs guided_json", "guided_whitespace_pattern")
        guided = vllm_grammars(
            self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, whitespace, fields
        )
        return guided if self.structured_outputs is None else [*guided, self.structured_outputs.grammar()]

    def tool_calling(self, tokenizer: Any, form: ToolFormat | None) -> ToolCalling | None:
        """Return how the answer may call tools, or None if it may not.

        Args:
            tokenizer: Has the chat template, which shows the form of the calls.
            form: The form of the calls, in place of the template's.

        Raises:
            BadRequestError: The fields about tools are invalid, or the chat template has no notion of tools.
        """
        return None

    def grammar(self, calling: ToolCalling | None, tokenizer: Any) -> GrammarSpec | None:
        """Return the grammar of the answer, or None. Raise BadRequestError if there is more than one."""
        specs = self.grammars()
        if calling is not None and (of_calls := calling.grammar(tokenizer)) is not None:
            specs.append(of_calls)
        elif calling is not None and specs:
            raise BadRequestError(
                f'{specs[0].param} would allow no call of a tool; set tool_choice to "none", or remove it',
                specs[0].param,
            )
        if len(specs) > 1:
            named = " and ".join(spec.param for spec in specs)
            raise BadRequestError(f"an answer can have one grammar, but {named} give {len(specs)}", specs[1].param)
        return specs[0] if specs else None

    def biases(self, vocabulary: int) -> dict[int, float]:
        """Return `logit_bias` by token id.

        Args:
            vocabulary: Number of tokens.

        Raises:
            BadRequestError: A key is not the id of a token.
        """
        for key in self.logit_bias or ():
            # Python refuses to convert thousands of digits
            if not (key.isascii() and key.isdigit() and len(key) <= LONGEST_ID and int(key) < vocabulary):
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
            offset: Characters of the tokens before them (count).
        """
        raise NotImplementedError

    def choice(
        self, index: int, text: str, finish: Finish | None, logprobs: Any = None, calls: Sequence[ParsedCall] = ()
    ) -> dict[str, Any]:
        """Return a choice of a complete response."""
        raise NotImplementedError

    def chunk(self, index: int, delta: Delta | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk. delta None: the first chunk, which has no text."""
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
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # values of OpenAI's other fields that ask for what this server does anyway
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: Literal["none"] | None = None
    # not supported: only null
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    safety_identifier: None = None
    web_search_options: None = None

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

    def grammars(self) -> list[GrammarSpec]:
        """Return the grammars that the fields ask for. Raise BadRequestError if a field is invalid."""
        of_format = None if self.response_format is None else self.response_format.grammar()
        return [*([] if of_format is None else [of_format]), *super().grammars()]

    def tool_calling(self, tokenizer: Any, form: ToolFormat | None) -> ToolCalling | None:
        """Return how the answer may call tools, or None if it may not; see the base class."""
        functions = callable_functions(self.tools, self.tool_choice, self.parallel_tool_calls)
        if not functions:
            return None
        is_free = self.tool_choice in (None, "auto")
        return ToolCalling.of(tokenizer, form, functions, is_free, self.parallel_tool_calls is not False)

    def prompt_tokens(self, tokenizer: Any) -> list[int]:
        """Return the prompt as token ids. Raise BadRequestError if it is invalid."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return rendered_prompt(tokenizer, self.messages, tools)

    def prompt_record(self, tokenizer: Any) -> dict[str, Any]:
        """Return the messages as the chat template gets them: role, text, tool calls and `tool_call_id`."""
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

    def choice(
        self, index: int, text: str, finish: Finish | None, logprobs: Any = None, calls: Sequence[ParsedCall] = ()
    ) -> dict[str, Any]:
        """Return a choice of a complete response."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.plain() for call in calls]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, delta: Delta | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk."""
        if isinstance(delta, str):
            delta = {"content": delta} if delta else {}
        first = {"role": "assistant", "content": ""}
        return {
            "index": index,
            "delta": first if delta is None else delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    continues_prompt = True
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
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0] if self.prompt else None
        if isinstance(text, str):
            check_unicode(text, "prompt")
            return list(tokenizer(text)["input_ids"])
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
            "text_offset": list(lengths)[: len(texts)],
        }

    def choice(
        self, index: int, text: str, finish: Finish | None, logprobs: Any = None, calls: Sequence[ParsedCall] = ()
    ) -> dict[str, Any]:
        """Return a choice of a complete response."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, delta: Delta | None, finish: Finish | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a choice of a streamed chunk."""
        return self.choice(index, delta if isinstance(delta, str) else "", finish, logprobs)


def _token_text(tokenizer: Any, token: int) -> tuple[str, bool]:
    """Return a token's text and True; for a part of a character, which has no text, its name in the vocabulary."""
    first, both = (tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2))
    if UNFINISHED in first:
        return tokenizer.convert_ids_to_tokens(token), False
    return both[len(first) :], True  # SentencePiece drops a space at the beginning of a text


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def refusal(errors: Sequence[Mapping[str, Any]]) -> BadRequestError:
    """Return the first error of a validation, as an error for the client."""
    # for a field with several types, prefer the error about the value over errors about the other types
    first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
    if first["type"] == "json_invalid":
        reason, position = first["ctx"]["error"], first["loc"][-1]
        return BadRequestError(f"the body is not valid JSON: {reason} at character {position}")
    place = [str(part) for part in first["loc"] if part != "body"]
    if not place and isinstance(first["input"], bytes):  # FastAPI parses a body as JSON only by its media type
        return BadRequestError("the body is not declared as JSON; send the header Content-Type: application/json")
    param = place[0] if place else None
    named = ".".join(place if param in NESTED else place[:1]) or "request"
    problem = "unknown field" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r:.100}"
    if first["type"] == "none_required":
        problem = f"not supported, got {first['input']!r:.100}; remove it"
    return BadRequestError(f"{named}: {problem}", param)
