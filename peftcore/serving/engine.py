"""Scheduler of continuous batching: one thread decodes all rows together, token by token, whatever their adapters.

One turn removes finished rows, runs one prefill forward for a part of new prompts, and decodes one token for all rows.
A long prompt therefore delays the other rows by one part at a time. If an earlier prompt of the same model had the same
beginning, its keys and values are taken from the prefix cache.
"""

import logging
import threading
import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from peftcore._util.fingerprint import unchanging_weights
from peftcore.composition import Composition
from peftcore.serving.admission import Admission
from peftcore.serving.catalog import Catalog
from peftcore.serving.errors import GrammarError, ServingError, ShuttingDownError
from peftcore.serving.forward import RoutedForward, Step
from peftcore.serving.generation import Generation
from peftcore.serving.kv_cache import KVCache
from peftcore.serving.limits import Limits
from peftcore.serving.metrics import Metrics
from peftcore.serving.prefix_cache import BLOCK, Block, PrefixCache, joined
from peftcore.serving.sampling import next_tokens, token_logprobs

logger = logging.getLogger(__name__)


class Prefill:
    """Requests whose prompts are processed together, part by part.

    `tokens` and `mask` (B, T) hold the part that is not yet processed. T is the most tokens of a prompt that are not in
    the prefix cache. A request with fewer such tokens also processes its last T tokens, so that no padding is
    between reused tokens and others.

    Args:
        generations: The requests.
        prefixes: For each request, the blocks of the beginning of its prompt.
        device: Device of the model.

    Shapes: B requests, T tokens.
    """

    def __init__(self, generations: Sequence[Generation], prefixes: Sequence[list[Block]], device: torch.device):
        self.generations = list(generations)
        width = max(_not_reusable(*pair) for pair in zip(generations, prefixes, strict=True))
        reused = [max(0, len(one.prompt) - width) for one in generations]
        self.tokens, self.mask = _padded([one.prompt[-width:] for one in generations], device)
        rows = [joined(blocks, count) if count else [] for blocks, count in zip(prefixes, reused, strict=True)]
        self.cache = KVCache.of_rows(rows, reused, device)
        self.reused = sum(reused)
        """Tokens that are taken from the prefix cache (count)."""

    @property
    def is_complete(self) -> bool:
        """True if all prompt tokens have been processed."""
        return not self.tokens.shape[1]

    def part(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the next columns of `tokens` and `mask`, which stay in the prefill until `advance` removes them.

        Args:
            tokens: Maximum of rows times columns; at least one column is returned.
        """
        width = max(1, tokens // len(self.generations))
        return self.tokens[:, :width], self.mask[:, :width]

    def advance(self, rows: Sequence[int], width: int, cache: KVCache) -> None:
        """Keep some requests (`rows`), and move on by `width` columns, which are in `cache` now."""
        self.generations = [self.generations[row] for row in rows]
        self.tokens, self.mask, self.cache = self.tokens[list(rows), width:], self.mask[list(rows), width:], cache


class Engine:
    """Processes requests in its own thread until it is stopped. Any thread may call the public methods.

    Args:
        forward: Forwards of the model.
        catalog: The models that requests can name.
        limits: Resource limits.
        metrics: Metrics of the server.
    """

    def __init__(self, forward: RoutedForward, catalog: Catalog, limits: Limits, metrics: Metrics):
        self._forward, self._limits, self._metrics = forward, limits, metrics
        self._changed = threading.Condition()
        self._has_changes = False
        self._admission = Admission(catalog, limits.max_batch, limits.max_queue, self.wake)
        self._rows: list[Generation] = []
        self._prefill: Prefill | None = None
        self._cache = KVCache.empty(0)
        self._prefixes = PrefixCache(limits.prefix_cache)
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="peftcore-engine", daemon=True)

    # -- public methods -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Add a request to the queue. Raise QueueFullError or ShuttingDownError if that is not possible."""
        with self._changed:
            if self._draining:
                raise ShuttingDownError("the server is shutting down; use another server")
            self._admission.add(generation)
        self.wake()

    def cancel(self, generation: Generation) -> None:
        """Cancel a request; its row is removed before the next token."""
        generation.abandoned = True
        self.wake()

    def drain(self) -> None:
        """Refuse new requests, and complete the present ones."""
        with self._changed:
            self._draining = True

    def stop(self, patience: float = 30.0) -> None:
        """Stop after the present step; unfinished requests fail.

        Args:
            patience: Time to wait for the thread (seconds).
        """
        self.drain()
        self._stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(patience)

    def wake(self) -> None:
        """Let the thread look for new requests and other changes."""
        with self._changed:
            self._has_changes = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """True if the thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """True if new requests are refused."""
        return self._draining

    @property
    def idle(self) -> bool:
        """True if no request is running or waiting."""
        # in the order in which a request moves, so that it is seen even if it moves in between
        return not len(self._admission) and self._prefill is None and not self._rows

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with (
            unchanging_weights()
        ):  # adapters are loaded and unloaded, but their weights do not change while they are served
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_changes or self._rows)
                self._has_changes = False
            if self._stopping:
                break
            try:
                self._turn()
            except Exception:
                logger.exception("the engine failed; all running requests fail")
                self._fail_rows(ServingError("internal error; see the server's log"))
                self.wake()  # for the waiting requests
        error = ShuttingDownError("the server was shut down before the request was complete; use another server")
        self._fail_rows(error)
        self._admission.fail(error)
        self._admission.close()

    def _turn(self) -> None:
        self._remove_finished()
        self._prefill_step()
        self._decode()
        self._metrics.queue_depth.set(len(self._admission))
        self._metrics.running_rows.set(sum(not one.finished for one in self._rows))

    def _remove_finished(self) -> None:
        """Remove finished and abandoned rows."""
        running = [row for row, one in enumerate(self._rows) if not one.finished and not one.abandoned]
        if len(running) == len(self._rows):
            return
        for generation in self._rows:
            if generation.abandoned:
                generation.release()
        self._rows = [self._rows[row] for row in running]
        self._cache = self._cache.select(running) if running else KVCache.empty(0)
        self._admission.released()

    def _prefill_step(self) -> None:
        """Process a part of the prompts of ready requests; requests whose prompt is complete get rows."""
        self._prefill = prefill = self._without_abandoned(self._prefill) or self._start_prefill()
        if prefill is None:
            return
        tokens, mask = prefill.part(self._limits.prefill_tokens)
        step = self._forward.step(prefill.cache, tokens, mask, [_route(one) for one in prefill.generations])
        self._fail_broken(prefill.generations, step)
        self._metrics.prompt_tokens.inc(int(mask.sum()))
        prefill.advance(step.rows, tokens.shape[1], step.cache)
        if not prefill.generations:
            self._prefill = None
        elif prefill.is_complete:
            self._store_prefixes(prefill)
            rows, cache = self._rows + prefill.generations, KVCache.join([self._cache, prefill.cache])
            # in the order of the stacked adapters, so that no layer has to sort its rows
            order = sorted(range(len(rows)), key=lambda row: sorted(_route(rows[row]).names()))
            self._push(prefill.generations, step)
            self._rows, self._prefill = [rows[row] for row in order], None
            self._cache = cache if order == list(range(len(rows))) else cache.select(order)
            for generation in prefill.generations:
                self._metrics.first_token(generation)
        self.wake()  # the prefill is incomplete, or more requests may be ready

    def _start_prefill(self) -> Prefill | None:
        # the first adapter replaces layers, so no forward may run at the same time
        alone = not self._forward.can_route
        ready = self._admission.ready(self._limits.max_batch - len(self._rows), alone, self._rows)
        prefixes = [self._prefixes.find(_weights(one), one.prompt) for one in ready]
        count = _how_many(ready, prefixes, self._limits.prefill_tokens)
        if not count:
            return None
        generations = ready[:count]
        # before `take`, so that `idle` is never true in between; a draining server would exit
        prefill = self._prefill = Prefill(generations, prefixes[:count], self._forward.model.device)
        self._metrics.reused_tokens.inc(prefill.reused)
        self._admission.take(generations)
        return prefill

    def _store_prefixes(self, prefill: Prefill) -> None:
        """Store the prompts of a complete prefill in the prefix cache."""
        for row, one in enumerate(prefill.generations):
            self._prefixes.store(_weights(one), one.prompt, prefill.cache.row(row, len(one.prompt)))
        self._metrics.prefix_cache_bytes.set(self._prefixes.size)

    def _without_abandoned(self, prefill: Prefill | None) -> Prefill | None:
        """Return the prefill without abandoned requests, or None if none is left."""
        if prefill is None:
            return None
        rows = [row for row, one in enumerate(prefill.generations) if not one.abandoned and not one.finished]
        if len(rows) < len(prefill.generations):
            for generation in prefill.generations:
                if generation.abandoned:
                    generation.release()
            prefill.advance(rows, 0, prefill.cache.select(rows))
            self._admission.released()
        return prefill if rows else None

    def _decode(self) -> None:
        """Decode one token for every row."""
        self._remove_finished()
        if not self._rows:
            return
        tokens = torch.tensor([[one.last] for one in self._rows], device=self._forward.model.device)
        step = self._forward.step(self._cache, tokens, torch.ones_like(tokens), [_route(one) for one in self._rows])
        self._fail_broken(self._rows, step)
        self._rows, self._cache = [self._rows[row] for row in step.rows], step.cache
        self._push(self._rows, step)

    def _fail_broken(self, generations: Sequence[Generation], step: Step) -> None:
        """Fail the requests whose rows failed in a step."""
        for row, failure in step.failures.items():
            logger.error("%s", failure, exc_info=failure.__cause__)
            generations[row].fail(failure)
        if step.failures:  # waiting requests may need the room of the failed ones' adapters
            self._admission.released()

    def _push(self, generations: Sequence[Generation], step: Step) -> None:
        """Sample the next token of each request, and append it."""
        if generations:
            allowed = self._allowed(generations)
            chosen = next_tokens(step.logits, [one.row for one in generations], allowed)
            for generation, token, logits in zip(generations, chosen, step.logits, strict=True):
                if generation.finished:  # its grammar failed
                    continue
                top = generation.sampling.logprobs
                try:
                    generation.push(token, None if top is None else token_logprobs(logits, token, top))
                except GrammarError as error:
                    self._fail(generation, error)
            self._metrics.generated_tokens.inc(len(generations))

    def _allowed(self, generations: Sequence[Generation]) -> dict[int, Tensor]:
        """Return {row: mask (V,)} of the tokens that grammars allow; a request whose grammar fails is ended."""
        masks: dict[int, Tensor] = {}
        constrained = [(row, one, one.row.matcher) for row, one in enumerate(generations) if one.row.matcher]
        if not constrained:
            return masks
        started = time.thread_time()
        for row, generation, matcher in constrained:
            try:
                masks[row] = matcher.allowed()
            except GrammarError as error:
                self._fail(generation, error)
        self._metrics.grammar_seconds.inc(time.thread_time() - started)
        self._metrics.grammar_tokens.inc(len(masks))
        return masks

    def _fail(self, generation: Generation, error: ServingError) -> None:
        """End one request with an error; its row is removed before the next token."""
        generation.fail(error)
        self._admission.released()

    def _fail_rows(self, error: ServingError) -> None:
        prefill = [] if self._prefill is None else self._prefill.generations
        for generation in [*self._rows, *prefill, *self._admission.take_loaded()]:
            generation.fail(error)
        self._rows, self._prefill, self._cache = [], None, KVCache.empty(0)
        self._admission.released()


def _route(generation: Generation) -> Composition:
    assert generation.lease is not None
    return generation.lease.route


def _weights(generation: Generation) -> Hashable:
    assert generation.lease is not None
    return generation.lease.weights


def _not_reusable(generation: Generation, prefix: Sequence[Block]) -> int:
    """Return how many tokens of a prompt must be processed: at least the last one, whose logits are needed."""
    return max(1, len(generation.prompt) - BLOCK * len(prefix))


def _how_many(generations: Sequence[Generation], prefixes: Sequence[list[Block]], tokens: int) -> int:
    """Return how many first requests fit into one forward of `tokens` tokens with padding: at least one, if any."""
    longest = 0
    for number, pair in enumerate(zip(generations, prefixes, strict=True)):
        longest = max(longest, _not_reusable(*pair))
        if number and (number + 1) * longest > tokens:
            return number
    return len(generations)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the token ids (B, T) and the attention mask (B, T) of prompts, padded at the left."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)
