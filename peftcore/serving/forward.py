"""One forward for rows that have different adapters, in which a row that goes wrong harms no other.

Where a step raises, or a logit is not finite, it is taken back and each composition is computed alone; those that fail
again are told apart from the others.

Shapes: B rows, T tokens of the step, v words of the vocabulary.
"""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peftcore.composition import Composition
from peftcore.errors import ConfigError
from peftcore.injection import activation
from peftcore.injection.adapter_set import ATTRIBUTE
from peftcore.serving.errors import AdapterFailedError
from peftcore.serving.row_cache import RowCache


@dataclass
class Step:
    """What came of a forward: the rows that are left, in their order, their logits (rows, v) and their cache."""

    rows: list[int]
    logits: Tensor
    cache: RowCache
    failures: dict[int, AdapterFailedError]


class RoutedForward:
    """Forwards of one model, which reads and writes text alone and keeps keys and values alone.

    Raises ConfigError for another kind of model.
    """

    def __init__(self, model: Any):
        self.model = model.eval()
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        _check_model(model)

    @property
    def can_route(self) -> bool:
        """Whether an adapter has ever been put into the model."""
        return ATTRIBUTE in self.model.__dict__

    @torch.no_grad()
    def step(self, cache: RowCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Step:
        """Read tokens (B, T), where mask (B, T) is 1, after what is in the cache, which is used up."""
        try:
            logits = self._logits(cache, tokens, mask, routes)
            finite: list[bool] = logits.isfinite().all(-1).tolist()
            error = None
        except Exception as raised:  # of whatever kind, it is the fault of what these rows asked for
            logits, finite, error = tokens.new_zeros(len(tokens), 0), [False] * len(tokens), raised
        if not all(finite) and len(set(routes)) > 1:
            cache.take_back()
            return self._apart(cache, tokens, mask, routes)
        if error is None:
            cache.extend(mask)
        rows = [row for row, good in enumerate(finite) if good]
        failures = {row: _failure(routes[row], error) for row, good in enumerate(finite) if not good}
        if failures:
            logits, cache = logits[rows], cache.select(rows) if rows else RowCache.empty(0)
        return Step(rows, logits, cache, failures)

    def _apart(self, cache: RowCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Step:
        """The same with each composition in a forward of its own."""
        order: list[int] = []
        steps: list[Step] = []
        failures: dict[int, AdapterFailedError] = {}
        for one in dict.fromkeys(routes):
            own = [row for row, other in enumerate(routes) if other == one]
            step = self.step(cache.select(own), tokens[own], mask[own], [one] * len(own))
            failures |= {own[row]: failure for row, failure in step.failures.items()}
            if step.rows:
                order += [own[row] for row in step.rows]
                steps.append(step)
        if not steps:
            return Step([], tokens.new_zeros(0, 0), RowCache.empty(0), failures)
        sort = sorted(range(len(order)), key=order.__getitem__)
        logits = torch.cat([step.logits for step in steps])[sort]
        return Step(sorted(order), logits, RowCache.join([step.cache for step in steps]).select(sort), failures)

    def _logits(self, cache: RowCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Tensor:
        """(B, v): of each row's last token."""
        given = {
            "input_ids": tokens,
            "attention_mask": torch.cat([cache.mask, mask], 1),
            "position_ids": cache.positions(mask),
            "cache": cache.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        routed = activation.routed(self.model, list(routes)) if self.can_route else contextlib.nullcontext()
        with routed:
            return self.model(**{key: value for key, value in given.items() if key in self._arguments}).logits[:, -1]


def _failure(one: Composition, error: Exception | None) -> AdapterFailedError:
    names = ", ".join(sorted(set(one.names()))) or "the base model"
    if error is None:
        return AdapterFailedError(f"{names} gave logits that are not finite; serve another version of it")
    failure = AdapterFailedError(f"{names} failed: {error}")
    failure.__cause__ = error
    return failure


def _check_model(model: Any) -> None:
    if model.config.is_encoder_decoder or "cache" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} is no decoder that takes a cache; serve a causal language model")
    kept = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if others := kept - {DynamicLayer, DynamicSlidingWindowLayer}:
        named = ", ".join(sorted(kind.__name__ for kind in others))
        raise ConfigError(
            f"{type(model).__name__} keeps {named} between tokens, and rows can join and leave keys and values alone; "
            "serve a model of attention layers"
        )
