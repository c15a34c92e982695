"""Middleware for every request: it checks the API key; below /v1 also the body's size, and it records metrics.

The middleware also cancels the generation of a client that has disconnected.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftcore.errors import ConfigError
from peftcore.serving.engine import Engine
from peftcore.serving.errors import ApiKeyError
from peftcore.serving.metrics import Metrics
from peftcore.serving.response import PendingResponse

CLIENT_GONE = 499
"""nginx's status for a client that has closed its connection; used in metrics only."""


def checked_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Return API keys without surrounding white space.

    Raises:
        ConfigError: A key is empty, for example because it was read from an unset variable.
    """
    stripped = tuple(key.strip() for key in keys)
    if not all(stripped):
        raise ConfigError("an API key is empty; check that its environment variable is set, or omit --api-key")
    return stripped


class AccessMiddleware:
    """ASGI middleware. Every path needs a key; sizes, metrics and cancellation are for paths below /v1.

    Args:
        app: The application.
        engine: The engine whose generations are cancelled.
        metrics: Metrics of the server.
        keys: Accepted API keys. Empty: no key is needed.
        max_body: Largest body of a request (bytes).
    """

    def __init__(self, app: ASGIApp, engine: Engine, metrics: Metrics, keys: Sequence[str], max_body: int):
        self.app, self._engine, self._metrics = app, engine, metrics
        self._keys, self._max_body = [_digest(key.encode()) for key in keys], max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Process one ASGI request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        app = self.app if self._is_allowed(Headers(scope=scope).get("authorization", "")) else _refuse
        if not scope["path"].startswith("/v1/"):
            await app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        started, size, status = time.monotonic(), 0, CLIENT_GONE

        async def counted_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, f"the request body is too large: more than {self._max_body:,} bytes")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
            elif not message.get("more_body", False):
                status = state.get("status", status)
            await send(message)

        try:
            await app(scope, counted_receive, watched_send)
        finally:
            response: PendingResponse | None = state.get("response")
            if response is not None:
                status = response.error.status if response.error else status
                for generation in response.generations:
                    if not generation.finished:
                        self._engine.cancel(generation)
                self._metrics.tool_calls.inc(response.tool_calls)
            if scope["method"] == "POST":
                self._metrics.requests.labels(state.get("model", "none"), str(status)).inc()
                if status == 200:
                    self._metrics.latency.observe(time.monotonic() - started)

    def _is_allowed(self, header: str) -> bool:
        sent = _digest(header.removeprefix("Bearer ").encode("latin-1"))  # headers' encoding; a key may be any bytes
        # compare with every key in constant time, so that the duration reveals nothing
        return not self._keys or sum(hmac.compare_digest(sent, key) for key in self._keys) > 0


def _digest(key: bytes) -> bytes:
    """Return a digest of a key; all have one length, so that a comparison does not reveal the key's length."""
    return hashlib.sha256(key).digest()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiKeyError("incorrect or missing API key; send the header `Authorization: Bearer KEY`")
    await JSONResponse(error.body(), error.status)(scope, receive, send)
