"""The response to one generation request: it receives text chunks from the engine, until a deadline.

The engine runs in its own thread and passes each chunk to the event loop through a queue.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request

from peftcore.serving.errors import ServingError, TimedOutError
from peftcore.serving.generation import Chunk, Event, Generation
from peftcore.serving.protocol import GenerationRequest, usage


class ClientGoneError(Exception):
    """Raised after the client has closed its connection."""


class PendingResponse:
    """Events of one generation, as a JSON object or as server-sent events.

    Args:
        start: Creates and submits the generation. Its argument is the function that receives the events.
        seconds: Time until TimedOutError.
    """

    def __init__(self, start: Callable[[Callable[[Event], None]], Generation], seconds: float):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._seconds, self._deadline = seconds, loop.time() + seconds

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.generation = start(deliver)
        self.error: ServingError | None = None
        """Error that ended the response."""

    async def next(self) -> Chunk:
        """Return the next chunk. Raise ServingError if the generation failed or timed out."""
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            event = TimedOutError(
                f"request timed out after {self._seconds:g} s; request fewer tokens, or try again later"
            )
        if isinstance(event, ServingError):
            self.error = event
            raise event
        return event

    async def complete(self, body: GenerationRequest) -> dict[str, Any]:
        """Return the whole response as one JSON object."""
        chunks = [await self.next()]
        while chunks[-1].finish is None:
            chunks.append(await self.next())
        choice = body.choice("".join(chunk.text for chunk in chunks), chunks[-1].finish)
        return {**body.envelope(streamed=False), "choices": [choice], "usage": self._usage(chunks[-1])}

    async def stream(self, body: GenerationRequest, chunk: Chunk) -> AsyncIterator[str]:
        """Yield the response as server-sent events, from its first chunk. An error is an event, after status 200."""
        envelope = body.envelope(streamed=True)
        has_usage = body.stream_options is not None and body.stream_options.include_usage

        def event(choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> str:
            return _event({**envelope, "choices": choices, **({"usage": counts} if has_usage else {})})

        yield event([body.chunk(None, None)])
        try:
            while chunk.finish is None:
                if chunk.text:
                    yield event([body.chunk(chunk.text, None)])
                chunk = await self.next()
        except ServingError as error:
            yield _event(error.body())
            return
        if chunk.text:
            yield event([body.chunk(chunk.text, None)])
        yield event([body.chunk("", chunk.finish)])
        if has_usage:
            yield event([], self._usage(chunk))
        yield "data: [DONE]\n\n"

    def _usage(self, last: Chunk) -> dict[str, int]:
        return usage(len(self.generation.prompt), last.tokens)


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
