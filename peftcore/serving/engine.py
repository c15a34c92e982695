"""The scheduler: one thread that decodes all running rows together, token by token, whatever adapters they have.

A turn: rows that are over leave, requests that are ready join (their prompts in one forward), all rows get a token.
"""

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.composition import Composition
from peftcore.fingerprint import unchanging_weights
from peftcore.serving.admission import Admission
from peftcore.serving.catalog import Catalog
from peftcore.serving.errors import ServingError, ShuttingDownError
from peftcore.serving.forward import RoutedForward, Step
from peftcore.serving.generation import Generation
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics
from peftcore.serving.row_cache import RowCache
from peftcore.serving.sampling import next_tokens

logger = logging.getLogger(__name__)


class Engine:
    """Answers generations until it is stopped. Every public method may be called by any thread."""

    def __init__(self, forward: RoutedForward, catalog: Catalog, limits: Limits, metrics: Metrics):
        self._forward, self._limits, self._metrics = forward, limits, metrics
        self._changed = threading.Condition()
        self._news = False
        self._admission = Admission(catalog, limits.max_batch, limits.max_queue, self.wake)
        self._rows: list[Generation] = []
        self._joining: list[Generation] = []
        """Requests whose prompts are being read."""
        self._cache = RowCache.empty(0)
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="peftcore-engine", daemon=True)

    # -- from outside --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Take a request on. Raises QueueFullError or ShuttingDownError."""
        with self._changed:
            if self._draining:
                raise ShuttingDownError("the server is shutting down; ask another one")
            self._admission.add(generation)
        self.wake()

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more; its row leaves before the next token."""
        generation.gone = True
        self.wake()

    def drain(self) -> None:
        """Take no more requests; those that there are go on to their end."""
        with self._changed:
            self._draining = True

    def stop(self, patience: float = 30.0) -> None:
        """End after the step that runs; requests that are not over fail. patience: seconds to wait for that."""
        self.drain()
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(patience)

    def wake(self) -> None:
        """There is something to look at."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._rows and not self._joining and not len(self._admission)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with unchanging_weights():  # adapters come and go, and nobody edits one that is served
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._rows)
                self._news = False
            if self._stopping:
                break
            try:
                self._turn()
            except Exception:
                logger.exception("the engine failed, and with it the requests that were running")
                self._fail_rows(ServingError("the server failed on this batch; its log says why"))
        error = ShuttingDownError("the server was shut down before this was answered; ask another one")
        self._fail_rows(error)
        self._admission.fail(error)
        self._admission.close()

    def _turn(self) -> None:
        self._leave()
        self._join()
        self._decode()
        self._metrics.queue_depth.set(len(self._admission))
        self._metrics.running_rows.set(sum(not one.over for one in self._rows))

    def _leave(self) -> None:
        """Rows that are over or whose client has gone make room."""
        kept = [row for row, one in enumerate(self._rows) if not one.over and not one.gone]
        if len(kept) == len(self._rows):
            return
        for generation in self._rows:
            if generation.gone:
                generation.release()
        self._rows = [self._rows[row] for row in kept]
        self._cache = self._cache.select(kept) if kept else RowCache.empty(0)
        self._admission.released()

    def _join(self) -> None:
        """Read the prompts of requests that are ready, and give them rows."""
        # the first adapter of all changes every layer, so no forward may run meanwhile
        alone = not self._forward.can_route
        found = self._admission.ready(self._limits.max_batch - len(self._rows), alone, bool(self._rows))
        joining = self._joining = _within(found, self._limits.prefill_tokens)
        if not joining:
            return
        self._admission.take(joining)
        tokens, mask = _padded([one.prompt for one in joining], self._forward.model.device)
        empty = RowCache.empty(len(joining), tokens.device)
        step = self._forward.step(empty, tokens, mask, [_route(one) for one in joining])
        alive = self._settle(joining, step)
        self._cache = RowCache.join([self._cache, step.cache])
        self._rows, self._joining = self._rows + alive, []
        self._metrics.prompt_tokens.inc(int(mask.sum()))
        for generation in alive:
            self._metrics.first_token(generation)
        self.wake()  # more may be ready than were read

    def _decode(self) -> None:
        """One more token for every row that is not over."""
        self._leave()
        if not self._rows:
            return
        tokens = torch.tensor([[one.last] for one in self._rows], device=self._forward.model.device)
        step = self._forward.step(self._cache, tokens, torch.ones_like(tokens), [_route(one) for one in self._rows])
        self._rows = self._settle(self._rows, step)
        self._cache = step.cache

    def _settle(self, generations: Sequence[Generation], step: Step) -> list[Generation]:
        """Give each row its token or its error; returns those that have a place in the step's cache."""
        for row, failure in step.failures.items():
            logger.error("%s", failure, exc_info=failure.__cause__)
            generations[row].fail(failure)
        alive = [generations[row] for row in step.rows]
        if alive:
            chosen = next_tokens(step.logits, [(one.sampling, one.generator) for one in alive])
            for generation, token in zip(alive, chosen, strict=True):
                generation.push(token)
            self._metrics.generated_tokens.inc(len(alive))
        return alive

    def _fail_rows(self, error: ServingError) -> None:
        for generation in [*self._rows, *self._joining]:
            generation.fail(error)
        self._rows, self._joining, self._cache = [], [], RowCache.empty(0)
        self._admission.released()


def _route(generation: Generation) -> Composition:
    assert generation.held is not None
    return generation.held.route


def _within(generations: list[Generation], tokens: int) -> list[Generation]:
    """The first of them, as many as are read in one forward of so many tokens with padding; at least one."""
    longest = 0
    for number, generation in enumerate(generations):
        longest = max(longest, len(generation.prompt))
        if number and (number + 1) * longest > tokens:
            return generations[:number]
    return generations


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (B, T) of prompts that end together."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)
