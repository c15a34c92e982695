"""The response to one request: it receives text chunks from the engine, until a deadline.

The engine runs in its own thread and passes each chunk to the event loop through a queue.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request

from peftcore.serving.errors import ServingError, TimedOutError
from peftcore.serving.generation import Chunk, Event, Generation
from peftcore.serving.protocol import Delta, GenerationRequest, usage
from peftcore.serving.tool_call_stream import ToolCallStream


class ClientGoneError(Exception):
    """Raised after the client has closed its connection."""


class PendingResponse:
    """Events of a request's completions, as a JSON object or as server-sent events.

    Args:
        start: Creates and submits the generation of a completion. Its arguments are the completion's number and the
            function that receives the events.
        seconds: Time until TimedOutError.
        count: Number of completions.
        calls: Makes a parser of tool calls for each completion. None: the text is the content.

    Raises:
        ServingError: A completion cannot be submitted; those before it are cancelled.
    """

    def __init__(
        self,
        start: Callable[[int, Callable[[Event], None]], Generation],
        seconds: float,
        count: int = 1,
        calls: Callable[[], ToolCallStream] | None = None,
    ):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._seconds, self._deadline = seconds, loop.time() + seconds

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._calls = [calls() for _ in range(count)] if calls is not None else []
        self.generations: list[Generation] = []
        try:
            for index in range(count):
                self.generations.append(start(index, partial(deliver, index)))
        except ServingError:
            for generation in self.generations:
                generation.abandoned = True
            raise
        self.error: ServingError | None = None
        """Error that ended the response."""
        self.tool_calls = 0
        """Tool calls of the completions that have ended (count)."""
        self._ended: set[int] = set()
        """Completions that ended here before the engine ended them."""
        self.answers: list[dict[str, Any]] | None = None
        """[{"index", "text", "finish"}] of a complete response, before its client has its end; None before that."""

    async def next(self) -> tuple[int, Chunk]:
        """Return the next chunk, after its completion's number. Raise ServingError if a completion failed."""
        try:
            async with asyncio.timeout_at(self._deadline):
                index, event = await self._events.get()
                while index in self._ended:
                    index, event = await self._events.get()
        except TimeoutError:
            advice = "request fewer tokens, or try again later"
            index, event = 0, TimedOutError(f"request timed out after {self._seconds:g} s; {advice}")
        if isinstance(event, ServingError):
            self.error = event
            raise event
        return index, event

    def _parsed(self, index: int, chunk: Chunk) -> tuple[Chunk, list[Delta]]:
        """Return a chunk with the finish reason of its completion, and its deltas of text and tool calls."""
        if not self._calls:
            return chunk, [chunk.text] if chunk.text else []
        parser = self._calls[index]
        deltas: list[Delta] = [*parser.push(chunk.text)]
        if parser.done and chunk.finish is None:  # the engine removes the row before its next token
            self.generations[index].abandoned = True
            self._ended.add(index)
            chunk = replace(chunk, finish="stop")
        if chunk.finish is not None:
            deltas += parser.finish(is_cut=chunk.finish == "length")
            self.tool_calls += len(parser.calls)
            if parser.calls and (chunk.finish == "stop" or parser.done):
                chunk = replace(chunk, finish="tool_calls")
        return chunk, deltas

    async def complete(self, body: GenerationRequest, tokenizer: Any) -> dict[str, Any]:
        """Return the whole response as one JSON object."""
        chunks: list[list[Chunk]] = [[] for _ in self.generations]
        while not all(part and part[-1].finish for part in chunks):
            index, chunk = await self.next()
            chunks[index].append(self._parsed(index, chunk)[0])
        self.answers = _answers(chunks)
        choices: list[dict[str, Any]] = []
        for index, (answer, part) in enumerate(zip(self.answers, chunks, strict=True)):
            text, calls = answer["text"], ()
            if self._calls:
                text, calls = self._calls[index].content, self._calls[index].calls
            choices.append(body.choice(index, text, answer["finish"], _logprobs(body, tokenizer, part, 0), calls))
        counts = self._usage([part[-1] for part in chunks])
        return {**body.envelope(streamed=False), "choices": choices, "usage": counts}

    async def stream(
        self,
        body: GenerationRequest,
        tokenizer: Any,
        first: tuple[int, Chunk],
        completed: Callable[[str], None] | None = None,
    ) -> AsyncIterator[str]:
        """Yield the response as server-sent events, from its first chunk. An error is an event, after status 200.

        Args:
            body: The request.
            tokenizer: Decodes the tokens of log-probabilities.
            first: The first chunk.
            completed: Called with the response's id before the event that ends the last completion.
        """
        envelope = body.envelope(streamed=True)
        chunks: list[list[Chunk]] = [[] for _ in self.generations]
        has_usage = body.stream_options is not None and body.stream_options.include_usage
        lengths, last = [0] * len(self.generations), dict[int, Chunk]()

        def event(choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> str:
            return _event({**envelope, "choices": choices, **({"usage": counts} if has_usage else {})})

        for index in range(len(self.generations)):
            yield event([body.chunk(index, None, None)])
        index, chunk = first
        while True:
            chunk, deltas = self._parsed(index, chunk)
            if completed is not None:
                chunks[index].append(chunk)
                if all(part and part[-1].finish for part in chunks):
                    self.answers = _answers(chunks)
                    completed(envelope["id"])
            logprobs = _logprobs(body, tokenizer, [chunk], lengths[index]) if deltas or chunk.logprobs else None
            lengths[index] += sum(map(len, (logprobs or {}).get("tokens", ())))
            for delta in deltas or ([""] if chunk.logprobs else []):
                yield event([body.chunk(index, delta, None, logprobs)])
                logprobs = None
            if chunk.finish is not None:
                yield event([body.chunk(index, "", chunk.finish)])
                last[index] = chunk
            if len(last) == len(self.generations):
                break
            try:
                index, chunk = await self.next()
            except ServingError as error:
                yield _event(error.body())
                return
        if has_usage:
            yield event([], self._usage(list(last.values())))
        yield "data: [DONE]\n\n"

    def _usage(self, last: list[Chunk]) -> dict[str, int]:
        return usage(len(self.generations[0].prompt), sum(chunk.tokens for chunk in last))


def _answers(chunks: list[list[Chunk]]) -> list[dict[str, Any]]:
    """Return the text and the finish reason of each completion from its chunks."""
    return [
        {"index": index, "text": "".join(chunk.text for chunk in part), "finish": part[-1].finish}
        for index, part in enumerate(chunks)
    ]


def _logprobs(body: GenerationRequest, tokenizer: Any, chunks: list[Chunk], offset: int) -> dict[str, Any] | None:
    """Return the field `logprobs` of a choice; None if the request asks for none."""
    if body.wanted_logprobs is None:
        return None
    return body.logprobs_object(tokenizer, [chunk.logprobs for chunk in chunks if chunk.logprobs is not None], offset)


async def unless_disconnected(request: Request, answer: Any) -> Any:
    """Return the result of a coroutine. If the client disconnects first, cancel it and raise ClientGoneError."""
    result, disconnect = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientGoneError
    finally:
        result.cancel()
        disconnect.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
