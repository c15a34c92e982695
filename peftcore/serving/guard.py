"""What stands before and after every request: its key, its size, and the count of what came of it."""

import hmac
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftcore.errors import ConfigError
from peftcore.serving.call import Call
from peftcore.serving.engine import Engine
from peftcore.serving.errors import ApiKeyError
from peftcore.serving.metrics import Metrics

CLIENT_GONE = 499
"""nginx's status for a client that has closed its connection, for the count alone."""


def checked_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Return API keys without surrounding white space.

    Raises:
        ConfigError: a key is empty, as it is where it was read from an unset variable.
    """
    stripped = tuple(key.strip() for key in keys)
    if not all(stripped):
        raise ConfigError(
            "an API key is empty; is the variable that it is read from set? Give a key, or no --api-key at all"
        )
    return stripped


class Guard:
    """ASGI middleware. keys: those that open /v1; none: anybody may. max_body: bytes."""

    def __init__(self, app: ASGIApp, engine: Engine, metrics: Metrics, keys: Sequence[str], max_body: int):
        self.app, self._engine, self._metrics = app, engine, metrics
        self._keys, self._max_body = [key.encode() for key in keys], max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        started, size, status = time.monotonic(), 0, CLIENT_GONE

        async def counted_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, f"the request has more than {self._max_body:,} bytes; send a shorter one")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
            elif not message.get("more_body", False):
                status = state.get("status", status)
            await send(message)

        try:
            if self._is_allowed(Headers(scope=scope).get("authorization", "")):
                await self.app(scope, counted_receive, watched_send)
            else:
                error = ApiKeyError("no such API key; send `Authorization: Bearer KEY` with one of the server's")
                await JSONResponse(error.body(), error.status)(scope, receive, watched_send)
        finally:
            call: Call | None = state.get("call")
            if call is not None:
                status = call.error.status if call.error else status
                if not call.generation.over:
                    self._engine.cancel(call.generation)
            if scope["method"] == "POST":
                self._metrics.requests.labels(state.get("model", "none"), str(status)).inc()
                if status == 200:
                    self._metrics.latency.observe(time.monotonic() - started)

    def _is_allowed(self, header: str) -> bool:
        given = header.removeprefix("Bearer ").encode("latin-1")  # as headers are read; a key may be any bytes
        # every key is compared, each in constant time, so that how long it takes tells nothing
        return not self._keys or sum(hmac.compare_digest(given, key) for key in self._keys) > 0
