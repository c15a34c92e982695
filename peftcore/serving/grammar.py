"""Grammars that constrain an answer: their specification, the interface of a backend, and a bounded cache.

A backend compiles a specification (`Compile`), and each completion gets a matcher of its own. Before each token the
matcher says which tokens may follow, and `sampling` gives all others the probability 0. Compiling runs in threads
beside the event loop and the engine. Size and time are limited, so a large grammar delays only its own request.

Shapes: V vocabulary.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from peftcore.serving.errors import BadRequestError, GrammarError, QueueFullError, ServingError
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics
from peftcore.serving.own_thread import in_own_thread

COMPILING = 2
"""Grammars that are compiled at the same time (count)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrammarSpec:
    """A grammar as a request gives it."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    """JSON schema; regular expression; JSON list of texts; or context-free grammar in Lark's or GBNF's form."""
    param: str
    """Field of the request, for errors."""
    lenient: bool = False
    """Do not enforce keywords of a JSON schema that the backend does not know, instead of refusing the schema."""
    whitespace: str | None = None
    """Regular expression of white space between the tokens of JSON; "" for none; None: the backend's default."""


class TokenMatcher(Protocol):
    """State of one completion in its grammar. The engine's thread calls it."""

    def allowed(self) -> Tensor:
        """Return the tokens that may follow as a mask (V,) of bool on the CPU; at least one is true.

        Raises:
            GrammarError: The grammar needs more time or memory than the limits allow.
        """
        ...

    def accept(self, token: int) -> None:
        """Move on by one token, which `allowed` allowed. Raise GrammarError if that is not possible."""
        ...

    @property
    def complete(self) -> bool:
        """True if the text is complete and no token may follow but the end-of-sequence token."""
        ...


class Grammar(Protocol):
    """A compiled grammar, which many completions may use at the same time."""

    def matcher(self) -> TokenMatcher:
        """Return a matcher at the start of the grammar."""
        ...


Compile = Callable[[GrammarSpec], Grammar]
"""Compiles a grammar, in any thread. Raises GrammarError with the reason if the grammar is invalid or too complex."""


class GrammarCache:
    """Compiled grammars, and those that are being compiled; the least recently used one is removed first.

    Refused grammars stay in the cache too, so that repeating such a request costs nothing. Only the event loop calls
    the methods.

    Args:
        load: Returns the backend's function; called once, in a thread, when the first request has a grammar. Raises
            ServingError if there is no backend.
        limits: Resource limits.
        metrics: Metrics of the server.
    """

    def __init__(self, load: Callable[[], Compile], limits: Limits, metrics: Metrics):
        self._load, self._limits, self._metrics = load, limits, metrics
        self._backend: Future[Compile] | None = None
        self._grammars: OrderedDict[GrammarSpec, Future[Grammar]] = OrderedDict()
        self._slots = asyncio.Semaphore(COMPILING)

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Return the compiled grammar.

        Raises:
            GrammarError: The grammar is invalid, too large, or takes too long to compile.
            QueueFullError: Grammars of other requests have not been compiled within the time limit.
            ServingError: The server has no backend.
        """
        result = "compiled"
        try:
            size = len(spec.text.encode("utf-8", "surrogatepass"))
            if size > self._limits.max_grammar:
                raise GrammarError(
                    f"{spec.param}: the grammar has {size:,} bytes; this server takes at most "
                    f"{self._limits.max_grammar:,}",
                    spec.param,
                )
            if spec in self._grammars:
                result = "cached"
                self._grammars.move_to_end(spec)
            return await self._compiled(spec)
        except ServingError:
            result = "refused"
            raise
        finally:
            self._metrics.grammars.labels(spec.kind, result).inc()

    async def _compiled(self, spec: GrammarSpec) -> Grammar:
        compile_one = await self._loaded()
        try:
            async with asyncio.timeout(self._limits.grammar_seconds):
                future = self._grammars.get(spec) or await self._start(compile_one, spec)
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            if spec not in self._grammars:
                raise QueueFullError("the server is compiling grammars of other requests; try again") from None
            raise GrammarError(
                f"{spec.param}: compiling the grammar takes more than {self._limits.grammar_seconds:g} s; simplify it",
                spec.param,
            ) from None

    async def _loaded(self) -> Compile:
        """Return the backend's function. A backend that could not be loaded is tried again by the next request."""
        if self._backend is None:
            self._backend = in_own_thread(self._load)
        backend = self._backend
        try:
            return await asyncio.shield(asyncio.wrap_future(backend))
        except Exception:
            if self._backend is backend:
                self._backend = None
            raise

    async def _start(self, compile_one: Compile, spec: GrammarSpec) -> "Future[Grammar]":
        """Start to compile a grammar as soon as fewer than `COMPILING` are being compiled."""
        await self._slots.acquire()
        if (started := self._grammars.get(spec)) is not None:  # by another request meanwhile
            self._slots.release()
            return started
        loop = asyncio.get_running_loop()
        future = self._grammars[spec] = in_own_thread(_compile, compile_one, spec)

        def release(_: "Future[Grammar]") -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._slots.release)

        future.add_done_callback(release)
        while len(self._grammars) > self._limits.grammar_cache:
            self._grammars.popitem(last=False)
        return future


def _compile(compile_one: Compile, spec: GrammarSpec) -> Grammar:
    try:
        return compile_one(spec)
    except ServingError:
        raise
    except Exception as error:
        logger.exception("a grammar could not be compiled")
        raise BadRequestError(
            f"{spec.param}: the grammar cannot be compiled: {type(error).__name__}", spec.param
        ) from error
