"""HTTP connections with a read deadline, so that clients that send half a request cannot keep others out.

uvicorn bounds neither the time that a request may take to arrive nor the number of connections. Each connection here
has a deadline for its whole request, head and body. Where connections would use up the process's file descriptors, the
one whose request has been incomplete for longest is closed.
"""

import asyncio
import logging
from collections.abc import MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class DeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline for reading a request.

    Args:
        read_timeout: seconds from a connection's start, or from the first byte of a later request on it, to the
            request's last byte.
        max_connections: open connections (count) above which the oldest incomplete one is closed.
        incomplete: connections of this server whose request is incomplete, oldest first; shared by all of them.
    """

    def __init__(
        self,
        *args: Any,
        read_timeout: float,
        max_connections: int,
        incomplete: "MutableMapping[DeadlineProtocol, None]",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._read_timeout, self._max_connections, self._incomplete = read_timeout, max_connections, incomplete
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline, and make room if there are too many connections."""
        super().connection_made(transport)
        self._start_deadline()
        if len(self.connections) > self._max_connections:
            oldest = next(iter(self._incomplete))
            if oldest is not self:
                logger.warning("%d connections are open; the oldest incomplete one is closed", len(self.connections))
                oldest.close_incomplete()

    def data_received(self, data: bytes) -> None:
        """Read what has come, and end the deadline if that completes the request."""
        if self._deadline is None and self.conn.their_state is h11.IDLE:
            self._start_deadline()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_deadline()

    def on_response_complete(self) -> None:
        """Go on to the next request, whose head may have come with the last one and whose body may never come."""
        super().on_response_complete()
        if self._deadline is None and self.conn.their_state is h11.SEND_BODY:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadline."""
        self._stop_deadline()
        super().connection_lost(exc)

    def close_incomplete(self) -> None:
        """Close the connection, with status 408 if no answer has begun."""
        self._stop_deadline()
        if not self.transport.is_closing():
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_TIMED_OUT)
            self.transport.close()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._read_timeout, self.close_incomplete)
        self._incomplete[self] = None

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._incomplete.pop(self, None)
