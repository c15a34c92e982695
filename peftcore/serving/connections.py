"""HTTP connections with a read deadline, against clients that open connections and never complete a request.

uvicorn limits neither the time for receiving a request nor the number of connections. Here each connection has a
deadline for its whole request, head and body. If there are more connections than file descriptors allow, one is closed:
the one that has been idle for the longest time, or else the one whose request has been incomplete for the longest time.
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
    """uvicorn's HTTP/1.1 protocol with a deadline for receiving a request.

    Args:
        read_timeout: Seconds from the connection's start, or from the first byte of a later request, to the last
            byte of the request.
        max_connections: Open connections (count) above which the oldest idle or incomplete connection is closed.
        incomplete: Connections of this server whose request is incomplete, oldest first; all connections share it.
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
        """Start the deadline, and close the oldest idle or incomplete connection if there are too many."""
        super().connection_made(transport)
        self._start_deadline()
        if len(self.connections) <= self._max_connections:
            return
        idle: list[Any] = [one for one in self.connections if isinstance(one, DeadlineProtocol) and one.is_idle]
        oldest = next(iter(self._incomplete))
        if idle:
            min(idle, key=lambda one: one.timeout_keep_alive_task.when()).timeout_keep_alive_handler()
        elif oldest is not self:
            logger.warning("%d connections are open; closing the oldest incomplete connection", len(self.connections))
            oldest.close_incomplete()

    @property
    def is_idle(self) -> bool:
        """True between an answer and the next request."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        return is_answered and self.timeout_keep_alive_task is not None and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        """Process received bytes, and stop the deadline if the request is complete."""
        if self._deadline is None and self.conn.their_state is h11.IDLE:
            self._start_deadline()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_deadline()

    def on_response_complete(self) -> None:
        """Start a deadline for the next request if its head has arrived and its body has not."""
        super().on_response_complete()
        if self._deadline is None and self.conn.their_state is h11.SEND_BODY:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._stop_deadline()
        super().connection_lost(exc)

    def close_incomplete(self) -> None:
        """Close the connection, with status 408 if no response has been started."""
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
