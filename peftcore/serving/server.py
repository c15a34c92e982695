"""Server process. The first SIGTERM or Ctrl-C completes running requests and then exits; the second exits at once."""

import contextlib
import gc
import logging
import socket
import time
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from peftcore.errors import ConfigError
from peftcore.serving.app import make_app, make_monitoring_app
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
        metrics_port: Second port, for monitoring without a key. 0: any free port. None: no such port.
    """

    def __init__(self, service: Service, host: str, port: int, metrics_port: int | None = None):
        super().__init__(_config(make_app(service), service, host, port))
        self._monitoring = (
            None
            if metrics_port is None
            else uvicorn.Server(_config(make_monitoring_app(service), service, host, metrics_port))
        )
        self._service = service
        self._drain_deadline: float | None = None

    @property
    def address(self) -> str:
        """URL after the start: http://host:port."""
        return _address(self)

    @property
    def metrics_address(self) -> str | None:
        """URL of the port for monitoring after the start; None if there is no such port."""
        return None if self._monitoring is None else _address(self._monitoring)

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
        if self._monitoring is not None:
            await self._monitoring.on_tick(counter)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and log the address. sockets: that of the API, and that of monitoring if there is one."""
        api, monitoring = (sockets[:1], sockets[1:]) if sockets else (None, None)
        if self._monitoring is not None:  # first, so that its port is open when the API answers
            self._monitoring.config.load()
            self._monitoring.lifespan = self._monitoring.config.lifespan_class(self._monitoring.config)
            await self._monitoring.startup(monitoring)
        await super().startup(api)
        if self.started:
            logger.info("serving %s on %s", ", ".join(self._service.catalog.names()[:8]), self.address)
            if self.metrics_address is not None:
                logger.info("monitoring on %s: /health, /ready, /metrics", self.metrics_address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen; the port for monitoring closes last."""
        await super().shutdown(sockets[:1] if sockets else None)
        if self._monitoring is not None:
            await self._monitoring.shutdown(sockets[1:] if sockets else None)


def _config(app: Any, service: Service, host: str, port: int) -> uvicorn.Config:
    # h11 limits headers (64 KiB); httptools, which uvicorn prefers if installed, does not
    protocol: Any = partial(
        DeadlineProtocol,
        read_timeout=service.limits.read_timeout,
        max_connections=max_connections(),
        incomplete={},
    )
    return uvicorn.Config(
        app,
        host,
        port,
        http=protocol,
        log_level="warning",
        timeout_keep_alive=service.limits.keep_alive,
        timeout_graceful_shutdown=5,
    )


def _address(server: uvicorn.Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(service: Service, host: str = "127.0.0.1", port: int = 8000, metrics_port: int | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        service: The model, its adapters and the engine.
        host: Address to listen on.
        port: Port to listen on. 0: any free port.
        metrics_port: Second port for /health, /ready and /metrics without a key. 0: any free port. None: no such port.

    Raises:
        ConfigError: An address cannot be used.
    """
    if not service.keys and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("listening on %s without an API key: everybody in the network can send requests", host)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_listening(host, port, "--port"))]
        if metrics_port is not None:
            sockets.append(stack.enter_context(_listening(host, metrics_port, "--metrics-port")))
        gc.collect()
        gc.freeze()  # looking at the objects of model and libraries again would hold up all answers for 0.25 s
        stack.callback(gc.unfreeze)  # at the end of the process, Triton prints what it has made and was not collected
        Server(service, host, port, metrics_port).run(sockets)


def _listening(host: str, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another --host or {option}") from error
