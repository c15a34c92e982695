"""The scheduler: one thread that decodes all running rows together, token by token, whatever adapters they have.

A turn: rows that are over leave, a part of the prompts of requests that are ready is read, all rows get a token. So a
long prompt holds the other rows up for no longer than one part takes.
"""

import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.composition import Composition
from peftcore.composition.fingerprint import unchanging_weights
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


class Reading:
    """Requests whose prompts are being read together, part by part.

    Shapes: B requests, T tokens of the longest prompt. tokens and mask (B, T) hold what has not been read yet.
    """

    def __init__(self, generations: Sequence[Generation], device: torch.device):
        self.generations = list(generations)
        self.tokens, self.mask = _padded([one.prompt for one in generations], device)
        self.cache = RowCache.empty(len(generations), device)

    @property
    def is_complete(self) -> bool:
        """Whether every token has been read."""
        return not self.tokens.shape[1]

    def part(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the next columns of tokens and mask: at most `tokens` elements, one column at least."""
        width = max(1, tokens // len(self.generations))
        return self.tokens[:, :width], self.mask[:, :width]

    def advance(self, rows: Sequence[int], width: int, cache: RowCache) -> None:
        """Keep some requests, whose next `width` columns are in `cache`."""
        self.generations = [self.generations[row] for row in rows]
        self.tokens, self.mask, self.cache = self.tokens[list(rows), width:], self.mask[list(rows), width:], cache


class Engine:
    """Answers generations until it is stopped. Every public method may be called by any thread."""

    def __init__(self, forward: RoutedForward, catalog: Catalog, limits: Limits, metrics: Metrics):
        self._forward, self._limits, self._metrics = forward, limits, metrics
        self._changed = threading.Condition()
        self._news = False
        self._admission = Admission(catalog, limits.max_batch, limits.max_queue, self.wake)
        self._rows: list[Generation] = []
        self._reading: Reading | None = None
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
        return not self._rows and self._reading is None and not len(self._admission)

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
        """Read a part of the prompts of requests that are ready; those read to their end get rows."""
        self._reading = reading = self._without_gone(self._reading) or self._begin_reading()
        if reading is None:
            return
        tokens, mask = reading.part(self._limits.prefill_tokens)
        step = self._forward.step(reading.cache, tokens, mask, [_route(one) for one in reading.generations])
        self._fail_broken(reading.generations, step)
        self._metrics.prompt_tokens.inc(int(mask.sum()))
        reading.advance(step.rows, tokens.shape[1], step.cache)
        if not reading.generations:
            self._reading = None
        elif reading.is_complete:
            self._push(reading.generations, step)
            self._cache = RowCache.join([self._cache, reading.cache])
            self._rows, self._reading = self._rows + reading.generations, None
            for generation in reading.generations:
                self._metrics.first_token(generation)
        self.wake()  # more is left to be read, or more may be ready

    def _begin_reading(self) -> Reading | None:
        # the first adapter of all changes every layer, so no forward may run meanwhile
        alone = not self._forward.can_route
        ready = self._admission.ready(self._limits.max_batch - len(self._rows), alone, bool(self._rows))
        generations = _within(ready, self._limits.prefill_tokens)
        if not generations:
            return None
        # before they leave the admission, so that `idle` is not true in between, when a server that drains would end
        reading = self._reading = Reading(generations, self._forward.model.device)
        self._admission.take(generations)
        return reading

    def _without_gone(self, reading: Reading | None) -> Reading | None:
        """Leave out requests whose clients have gone."""
        if reading is None:
            return None
        rows = [row for row, one in enumerate(reading.generations) if not one.gone and not one.over]
        if len(rows) < len(reading.generations):
            for generation in reading.generations:
                if generation.gone:
                    generation.release()
            reading.advance(rows, 0, reading.cache.select(rows))
            self._admission.released()
        return reading if rows else None

    def _decode(self) -> None:
        """One more token for every row that is not over."""
        self._leave()
        if not self._rows:
            return
        tokens = torch.tensor([[one.last] for one in self._rows], device=self._forward.model.device)
        step = self._forward.step(self._cache, tokens, torch.ones_like(tokens), [_route(one) for one in self._rows])
        self._fail_broken(self._rows, step)
        self._rows, self._cache = [self._rows[row] for row in step.rows], step.cache
        self._push(self._rows, step)

    def _fail_broken(self, generations: Sequence[Generation], step: Step) -> None:
        """End the requests that a step has failed for."""
        for row, failure in step.failures.items():
            logger.error("%s", failure, exc_info=failure.__cause__)
            generations[row].fail(failure)
        if step.failures:  # requests may wait for the adapters of those that have failed
            self._admission.released()

    def _push(self, generations: Sequence[Generation], step: Step) -> None:
        """Give the requests that are left after a step their next token."""
        if generations:
            chosen = next_tokens(step.logits, [(one.sampling, one.generator) for one in generations])
            for generation, token in zip(generations, chosen, strict=True):
                generation.push(token)
            self._metrics.generated_tokens.inc(len(generations))

    def _fail_rows(self, error: ServingError) -> None:
        reading = [] if self._reading is None else self._reading.generations
        for generation in [*self._rows, *reading]:
            generation.fail(error)
        self._rows, self._reading, self._cache = [], None, RowCache.empty(0)
        self._admission.released()


def _route(generation: Generation) -> Composition:
    assert generation.held is not None
    return generation.held.route


def _within(generations: list[Generation], tokens: int) -> list[Generation]:
    """Return the first requests, as many as fit one forward of `tokens` tokens with padding; at least one."""
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
