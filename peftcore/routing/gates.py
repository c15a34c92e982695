"""Mixtures weighed token by token.

Arrow (arXiv:2405.11157): an adapter's prototype at a layer is the direction that its ΔW = B A stretches most, and a
token's weights are a softmax over the top k of |⟨x, prototype⟩| / temperature.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.composition.algebra import Gate
from peftcore.composition.fingerprint import Fingerprint
from peftcore.errors import RoutingError
from peftcore.kernels.factors import Factors, svd_of_factors


def arrow_gate(names: Sequence[str], top_k: int | None = None, temperature: float = 1.0) -> Gate:
    """Arrow over these adapters, of methods with two factors; top_k: of each token (count), None: all.

    Prototypes are computed when a token first comes to a layer, and anew when an adapter's weights have changed.
    """
    if temperature <= 0:
        raise RoutingError(f"arrow_gate: temperature must be above 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= len(names):
        raise RoutingError(f"arrow_gate: top_k must be from 1 to {len(names)}, got {top_k}")
    return Gate(tuple(names), _Arrow(top_k, temperature))


class _Arrow:
    def __init__(self, top_k: int | None, temperature: float):
        self.top_k, self.temperature = top_k, temperature
        self.prototypes: MutableMapping[Adapter, tuple[Fingerprint, Tensor]] = WeakKeyDictionary()
        """With the fingerprint of the weights that they were computed from."""

    def __call__(self, path: str, adapters: Mapping[str, Any], x: Tensor) -> Tensor:
        """(..., k)"""
        prototypes = torch.stack([self._prototype(path, adapter) for adapter in adapters.values()])
        scores = (x.to(prototypes.dtype) @ prototypes.T).abs() / self.temperature
        if self.top_k is not None and self.top_k < len(adapters):
            kept, places = scores.topk(self.top_k, dim=-1)
            scores = torch.full_like(scores, -torch.inf).scatter(-1, places, kept)
        return F.softmax(scores, dim=-1).to(x.dtype)

    @torch.no_grad()
    def _prototype(self, path: str, adapter: Adapter) -> Tensor:
        kept = self.prototypes.get(adapter)
        if kept is not None and kept[0].holds():
            return kept[1]
        fingerprint, factors = Fingerprint([adapter]), adapter.low_rank()
        if factors is None or adapter.base.kind != "linear":
            raise RoutingError(f"Arrow needs adapters of two factors; {type(adapter).__name__} at {path} has none")
        direction = prototype(factors.a, factors.b)
        self.prototypes[adapter] = fingerprint, direction
        return direction


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """Return the first right singular vector (i,) of BA, from A (r, i) and B (o, r), without forming BA."""
    return svd_of_factors(Factors(a[None], b[None]), 1).vh[0, 0]
