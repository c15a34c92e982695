"""One HTTP request's side of a generation: its events as they come, its deadline, its answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request

from peftcore.serving.errors import ServingError, TimedOutError
from peftcore.serving.generation import Event, Generation, Piece
from peftcore.serving.protocol import GenerationRequest, usage


class ClientGoneError(Exception):
    """The client has closed its connection."""


class Call:
    """start: what makes the generation that tells its events to a function, and submits it. seconds: until TimedOut."""

    def __init__(self, start: Callable[[Callable[[Event], None]], Generation], seconds: float):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._seconds, self._deadline = seconds, loop.time() + seconds

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.generation = start(deliver)
        self.error: ServingError | None = None
        """What ended it, if it was no success."""

    async def next(self) -> Piece:
        """The next piece. Raises ServingError."""
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            event = TimedOutError(f"not answered within {self._seconds:g} s; ask for fewer tokens, or later")
        if isinstance(event, ServingError):
            self.error = event
            raise event
        return event

    async def whole(self, given: GenerationRequest) -> dict[str, Any]:
        """The answer in one object."""
        pieces = [await self.next()]
        while pieces[-1].finish is None:
            pieces.append(await self.next())
        choice = given.choice("".join(piece.text for piece in pieces), pieces[-1].finish)
        return {**given.envelope(streamed=False), "choices": [choice], "usage": self._usage(pieces[-1])}

    async def stream(self, given: GenerationRequest, piece: Piece) -> AsyncIterator[str]:
        """The answer as server-sent events; piece: the first one. An error is an event: the status has been sent."""
        envelope = given.envelope(streamed=True)
        counted = given.stream_options is not None and given.stream_options.include_usage

        def part(choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> str:
            return _event({**envelope, "choices": choices, **({"usage": counts} if counted else {})})

        yield part([given.piece(None, None)])
        try:
            while piece.finish is None:
                if piece.text:
                    yield part([given.piece(piece.text, None)])
                piece = await self.next()
        except ServingError as error:
            yield _event(error.body())
            return
        if piece.text:
            yield part([given.piece(piece.text, None)])
        yield part([given.piece("", piece.finish)])
        if counted:
            yield part([], self._usage(piece))
        yield "data: [DONE]\n\n"

    def _usage(self, last: Piece) -> dict[str, int]:
        return usage(len(self.generation.prompt), last.tokens)


async def unless_gone(request: Request, answer: Any) -> Any:
    """What a coroutine gives. Raises ClientGoneError, and cancels it, if the client leaves before."""
    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
