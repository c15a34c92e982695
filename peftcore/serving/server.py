"""The server process: it ends when told to once, after what it has begun, and at once when told to twice."""

import logging
import socket
import time
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from peftcore.errors import ConfigError
from peftcore.serving.app import make_app
from peftcore.serving.connections import DeadlineProtocol
from peftcore.serving.service import Service

logger = logging.getLogger(__name__)

CONNECTIONS_WITHOUT_LIMIT = 4096
"""Open connections (count) where the system does not say how many file descriptors a process may have."""


def max_connections() -> int:
    """Return how many connections may be open (count): half of the process's file descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return CONNECTIONS_WITHOUT_LIMIT
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS_WITHOUT_LIMIT if soft == resource.RLIM_INFINITY else max(8, soft // 2)


class Server(uvicorn.Server):
    """uvicorn, that goes on answering (503 to new requests) until the requests that run are over."""

    def __init__(self, service: Service, host: str, port: int):
        # h11 bounds headers (64 KiB); httptools, which uvicorn would take where it is installed, does not
        protocol: Any = partial(
            DeadlineProtocol,
            read_timeout=service.limits.read_timeout,
            max_connections=max_connections(),
            incomplete={},
        )
        super().__init__(
            uvicorn.Config(
                make_app(service), host, port, http=protocol, log_level="warning", timeout_graceful_shutdown=5
            )
        )
        self._service = service
        self._until: float | None = None

    @property
    def address(self) -> str:
        """Where it listens, once it has started: http://host:port."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def drain(self) -> None:
        """End when what runs is over, or after the limits' grace."""
        self._service.engine.drain()
        self._until = time.monotonic() + self._service.limits.grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains, the next one ends."""
        if self._until is None:
            self.drain()
        else:
            self._service.engine.stop(0)
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s: whether to end."""
        if self._until is not None:
            late = time.monotonic() > self._until
            if late:
                logger.warning("requests still run %g s after the signal; they fail", self._service.limits.grace)
                self._service.engine.stop(0)
            self.should_exit = self.should_exit or late or self._service.engine.idle
        return await super().on_tick(counter)

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        """Begin to listen, and say where."""
        await super().startup(sockets)
        if self.started:
            logger.info("serving %s on %s", ", ".join(self._service.catalog.names()[:8]), self.address)


def serve(service: Service, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or Ctrl-C. port 0: any that is free. Raises ConfigError for an address that cannot be had."""
    if not service.keys and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("%s can be reached by others, and without an API key anybody can ask", host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; take another --host or --port") from error
    with listening:
        Server(service, host, port).run([listening])
