"""One forward for rows with different adapters, in which a failing adapter affects only its own rows.

If a step raises an error, or a logit is not finite, the step is discarded and each composition is computed alone. The
compositions that fail again are reported, and the other rows continue.

Shapes: B rows, T tokens of the step, V vocabulary.
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
from peftcore.cpu_decoding import use_compiled_code
from peftcore.errors import ConfigError
from peftcore.injection import activation
from peftcore.injection.adapter_set import ATTRIBUTE
from peftcore.serving.errors import AdapterFailedError
from peftcore.serving.kv_cache import KVCache


@dataclass
class Step:
    """Result of a forward: successful rows in order, their logits (rows, V) and cache, and the failures by row."""

    rows: list[int]
    logits: Tensor
    cache: KVCache
    failures: dict[int, AdapterFailedError]


class RoutedForward:
    """Forwards of a causal language model with attention layers only.

    Args:
        model: The base model, which may have adapters.

    Raises:
        ConfigError: The model is not a decoder with a cache of keys and values.
    """

    def __init__(self, model: Any):
        self.model = model.eval()
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        _check_model(model)
        use_compiled_code(model)

    @property
    def can_route(self) -> bool:
        """True if the model has had an adapter, and so accepts routes."""
        return ATTRIBUTE in self.model.__dict__

    @torch.no_grad()
    def step(self, cache: KVCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Step:
        """Compute the next tokens' logits; `cache` must not be used again.

        Args:
            cache: Keys and values of the earlier tokens.
            tokens: (B, T) token ids.
            mask: (B, T), 0 for padding.
            routes: The composition of adapters for each row.
        """
        try:
            logits = self._logits(cache, tokens, mask, routes)
            finite: list[bool] = logits.abs().amax(-1).isfinite().tolist()  # 9 times as fast as isfinite of all
            error = None
        except Exception as raised:  # any error, because adapters run arbitrary code
            logits, finite, error = tokens.new_zeros(len(tokens), 0), [False] * len(tokens), raised
        if not all(finite) and len(set(routes)) > 1:
            cache.discard_step()
            return self._one_by_one(cache, tokens, mask, routes)
        if error is None:
            cache.extend(mask)
        rows = [row for row, good in enumerate(finite) if good]
        failures = {row: _failure(routes[row], error) for row, good in enumerate(finite) if not good}
        if failures:
            logits, cache = logits[rows], cache.select(rows) if rows else KVCache.empty(0)
        return Step(rows, logits, cache, failures)

    def _one_by_one(self, cache: KVCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Step:
        """Compute a step with one forward for each composition."""
        order: list[int] = []
        steps: list[Step] = []
        failures: dict[int, AdapterFailedError] = {}
        for one in dict.fromkeys(routes):
            selected = [row for row, other in enumerate(routes) if other == one]
            step = self.step(cache.select(selected), tokens[selected], mask[selected], [one] * len(selected))
            failures |= {selected[row]: failure for row, failure in step.failures.items()}
            if step.rows:
                order += [selected[row] for row in step.rows]
                steps.append(step)
        if not steps:
            return Step([], tokens.new_zeros(0, 0), KVCache.empty(0), failures)
        sort = sorted(range(len(order)), key=order.__getitem__)
        logits = torch.cat([step.logits for step in steps])[sort]
        return Step(sorted(order), logits, KVCache.join([step.cache for step in steps]).select(sort), failures)

    def _logits(self, cache: KVCache, tokens: Tensor, mask: Tensor, routes: Sequence[Composition]) -> Tensor:
        """Return the logits (B, V) of each row's last token."""
        arguments = {
            "input_ids": tokens,
            "attention_mask": torch.cat([cache.mask, mask], 1),
            "position_ids": cache.positions(mask),
            "cache": cache.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        routed = activation.routed(self.model, list(routes)) if self.can_route else contextlib.nullcontext()
        with routed:
            return self.model(**{key: value for key, value in arguments.items() if key in self._arguments}).logits[
                :, -1
            ]


def _failure(one: Composition, error: Exception | None) -> AdapterFailedError:
    names = ", ".join(sorted(set(one.names()))) or "the base model"
    if error is None:
        return AdapterFailedError(f"{names} returned logits that are not finite; serve another version")
    failure = AdapterFailedError(f"{names} failed: {error}")
    failure.__cause__ = error
    return failure


def _check_model(model: Any) -> None:
    if model.config.is_encoder_decoder or "cache" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} is not a decoder with a cache; serve a causal language model")
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if others := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        named = ", ".join(sorted(kind.__name__ for kind in others))
        raise ConfigError(
            f"{type(model).__name__} keeps {named} between tokens, but this server batches only keys and values; "
            "serve a model with attention layers only"
        )
