"""Server process. The first SIGTERM or Ctrl-C completes running requests and then exits; the second exits at once."""

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
"""Most open connections (count) if the system does not limit file descriptors."""


def max_connections() -> int:
    """Return the most connections that may be open (count): half of the process's file descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return CONNECTIONS_WITHOUT_LIMIT
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS_WITHOUT_LIMIT if soft == resource.RLIM_INFINITY else max(8, soft // 2)


class Server(uvicorn.Server):
    """uvicorn server that completes running requests at shutdown; new requests get 503 meanwhile.

    Args:
        service: The model, its adapters and the engine.
        host: Address to listen on.
        port: Port to listen on. 0: any free port.
    """

    def __init__(self, service: Service, host: str, port: int):
        # h11 limits headers (64 KiB); httptools, which uvicorn prefers if installed, does not
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
        self._drain_deadline: float | None = None

    @property
    def address(self) -> str:
        """URL after the start: http://host:port."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def drain(self) -> None:
        """Exit once running requests are complete, or after the limits' grace period."""
        self._service.engine.drain()
        self._drain_deadline = time.monotonic() + self._service.limits.grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one drains, the second one stops the server."""
        if self._drain_deadline is None:
            self.drain()
        else:
            self._service.engine.stop(0)
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server has to exit. uvicorn calls this method every 0.1 s."""
        if self._drain_deadline is not None:
            late = time.monotonic() > self._drain_deadline
            if late:
                logger.warning(
                    "requests are still running %g s after the signal; cancelling them", self._service.limits.grace
                )
                self._service.engine.stop(0)
            self.should_exit = self.should_exit or late or self._service.engine.idle
        return await super().on_tick(counter)

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        """Start to listen, and log the address."""
        await super().startup(sockets)
        if self.started:
            logger.info("serving %s on %s", ", ".join(self._service.catalog.names()[:8]), self.address)


def serve(service: Service, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        service: The model, its adapters and the engine.
        host: Address to listen on.
        port: Port to listen on. 0: any free port.

    Raises:
        ConfigError: The address cannot be used.
    """
    if not service.keys and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("listening on %s without an API key: everybody in the network can send requests", host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
    with listening:
        Server(service, host, port).run([listening])
