"""Arrow (arXiv:2405.11157): a mixture of adapters with weights for every token, without training.

`peftcore/kernels/arrow.py` has the mathematics. The gate takes exact prototypes; the router of `create_arrow_model`
takes HF PEFT's estimates.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peftcore._util.fingerprint import Fingerprint
from peftcore.adapter import Adapter
from peftcore.composition.algebra import Gate
from peftcore.errors import RoutingError
from peftcore.kernels.arrow import prototype, token_weights


def arrow_gate(names: Sequence[str], top_k: int | None = None, temperature: float = 1.0) -> Gate:
    """Return a gate that weighs adapters by Arrow.

    Prototypes are computed at the first forward pass of a layer, and again if an adapter's weights have changed.

    Args:
        names: the adapters, of low-rank methods.
        top_k: adapters per token (count); None: all.
        temperature: temperature of the softmax, above 0.

    Raises:
        RoutingError: `top_k` or `temperature` is out of range.
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
        """{adapter: (fingerprint of its weights, prototype)}"""

    def __call__(self, path: str, adapters: Mapping[str, Any], x: Tensor) -> Tensor:
        """Return the weights (..., m) of m adapters for x (..., i)."""
        prototypes = torch.stack([self._prototype(path, adapter) for adapter in adapters.values()])
        return token_weights(x, prototypes, self.top_k or len(adapters), self.temperature)

    @torch.no_grad()
    def _prototype(self, path: str, adapter: Adapter) -> Tensor:
        cached = self.prototypes.get(adapter)
        if cached is not None and cached[0].holds(trusts_learning=True):
            return cached[1]
        fingerprint, factors = Fingerprint([adapter]), adapter.low_rank()
        if factors is None or adapter.base.kind != "linear":
            raise RoutingError(
                f"Arrow needs low-rank adapters of linear layers; {type(adapter).__name__} at {path} is none; leave it "
                "out"
            )
        direction = prototype(factors.a, factors.b)
        self.prototypes[adapter] = fingerprint, direction
        return direction
