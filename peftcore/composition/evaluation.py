"""A composition at one layer, whatever the methods: what `peftcore.composition.stacked` does not take.

Rows are put together by composition. Where each of those is a chain, the base layer is called once for all rows, each
row with what its own adapters made of the input.

Shapes: n rows of the layer's input, o out_features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from peftcore.adapter import Adapter
from peftcore.composition.algebra import Composition, Gate, Only, Split, Stack, Weighted
from peftcore.composition.route import Route, RoutedLayer
from peftcore.errors import RoutingError

Below = Callable[[Tensor], Tensor]


class Layer(RoutedLayer, Protocol):
    """What is wanted of an adapted layer."""

    def unmerged(self) -> Mapping[str, Adapter]:
        """{name: adapter} of the layer's adapters that are not merged."""
        ...

    def in_order(self, names: Sequence[str]) -> list[Adapter]:
        """Those of `unmerged` with these names, in this order, each one's trained bias after it."""
        ...

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives."""
        ...

    def chain_output(self, adapters: Sequence[Adapter], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What adapters one on top of another give."""
        ...


def composed(layer: Layer, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output for x, whose rows go the ways that `route` says."""
    site = _Site(layer, route, args, kwargs)
    if route.uniform is not None:
        return site.of(route.uniform, x)
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise RoutingError(f"{layer.path} is called with more tensors than its input, whose rows are unknown")
    route.check_layer(x, layer)
    groups = route.groups(x)
    inputs = [x.index_select(0, rows) for _, rows in groups]
    chains = [site.chain(one) for one, _ in groups]
    if any(chain is None or any(adapter.through_weight for adapter in chain) for chain in chains):
        outputs = [replace(site, rows=rows).of(one, z) for (one, rows), z in zip(groups, inputs, strict=True)]
    else:
        outputs = site.of_chains([chain or [] for chain in chains], inputs, x, [rows for _, rows in groups])
    order = torch.cat([rows for _, rows in groups]).argsort()
    return torch.cat(outputs).index_select(0, order)


@dataclass(frozen=True)
class _Site:
    """One call of one layer; rows: those of its input that are computed, None for all."""

    layer: Layer
    route: Route
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor | None = None

    def chain(self, one: Composition) -> list[Adapter] | None:
        """The layer's adapters where they act one on top of another, and that is all."""
        chain = one.chain()
        return None if chain is None else self.layer.in_order(chain)

    def base(self, x: Tensor) -> Tensor:
        return self.layer.base_output(x, *self.args, **self.kwargs)

    def of_chains(
        self,
        chains: Sequence[Sequence[Adapter]],
        inputs: Sequence[Tensor],
        x: Tensor,
        rows: Sequence[Tensor],
    ) -> list[Tensor]:
        """The outputs of each group of rows, from one call of the base."""
        descents = [_descend(chain, z) for chain, z in zip(chains, inputs, strict=True)]
        if all(lowest is z for (_, lowest), z in zip(descents, inputs, strict=True)):
            y = self.base(x)
            outputs = [y.index_select(0, own) for own in rows]
        else:
            outputs = list(self.base(torch.cat([lowest for _, lowest in descents])).split([len(z) for z in inputs]))
        return [_ascend(c, seen, y) for c, (seen, _), y in zip(chains, descents, outputs, strict=True)]

    def of(self, one: Composition, x: Tensor, below: Below | None = None) -> Tensor:
        """c(x) on top of `below`, which is the base where it is None."""
        if (adapters := self.chain(one)) is not None:
            return self._chain_on(adapters, x, below)
        if isinstance(one, Stack):
            for child in one.children():
                below = self._on_top(child, below)
            return self.base(x) if below is None else below(x)
        y = self.base(x) if below is None else below(x)
        tokens = y.shape[:-1]
        changes = [(child, self.of(child, x, below) - y) for child in one.children()]
        if isinstance(one, Weighted):
            weighted = [weight * change for (_, weight), (_, change) in zip(one.summands, changes, strict=True)]
        elif isinstance(one, Split):
            places = [self.route.inside(tokens, self.layer.path, a, b, self.rows) for _, a, b in one.segments]
            weighted = [torch.where(p.unsqueeze(-1), change, 0) for p, (_, change) in zip(places, changes, strict=True)]
        elif isinstance(one, Gate):
            weights = one.weights(self.layer.path, self.layer.unmerged(), x, tokens).to(y.dtype)
            weighted = [weights[..., number, None] * change for number, (_, change) in enumerate(changes)]
        else:
            raise TypeError(f"{type(one).__name__} is a composition that cannot be evaluated")
        for change in weighted:
            y = y + change
        return y

    def _on_top(self, one: Composition, below: Below | None) -> Below:
        return lambda x: self.of(one, x, below)

    def _chain_on(self, adapters: Sequence[Adapter], x: Tensor, below: Below | None) -> Tensor:
        if below is None and any(adapter.through_weight for adapter in adapters):
            return self.layer.chain_output(adapters, x)
        if any(adapter.through_weight for adapter in adapters):
            raise RoutingError(
                f"{self.layer.path}: {type(adapters[0]).__name__} acts on the base's weight there, so it cannot stand "
                "on a mixture of adapters; put it below, or merge the mixture first"
            )
        seen, lowest = _descend(adapters, x)
        return _ascend(adapters, seen, self.base(lowest) if below is None else below(lowest))


def _descend(chain: Sequence[Adapter], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """(the input of each adapter from the top down, what reaches the base)"""
    seen = []
    for adapter in reversed(chain):
        seen.append(x)
        x = adapter.before(x)
    return seen, x


def _ascend(chain: Sequence[Adapter], seen: list[Tensor], y: Tensor) -> Tensor:
    for adapter, x in zip(chain, reversed(seen), strict=True):
        y = adapter.after(x, y)
    return y


def composed_weight(one: Composition, weight: Tensor, adapters: Mapping[str, Adapter], path: str) -> Tensor:
    """The same on a weight, for what is adapted as a weight: W + Σ wᵢ (cᵢ(W) − W)."""
    if isinstance(one, Only):
        return adapters[one.name].merged_weight(weight) if one.name in adapters else weight
    if isinstance(one, Stack):
        for child in one.children():
            weight = composed_weight(child, weight, adapters, path)
        return weight
    if isinstance(one, Weighted):
        changes = [w * (composed_weight(child, weight, adapters, path) - weight) for child, w in one.summands]
        return weight + sum(changes)
    raise RoutingError(
        f"{path} is adapted as a whole weight, which no {type(one).__name__} by tokens can change; leave it out"
    )
