"""The general path of a composition of adapters at one layer, for every method.

Rows of a batch are grouped by composition. If every composition is a chain, the base layer is called once for all
rows, each with the input that the row's own adapters made.

Shapes: n rows of the layer's input, i in_features, o out_features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcore.adapter import Adapter
from peftcore.composition.algebra import Composition, Gate, Only, Split, Stack, Weighted
from peftcore.composition.route import Route
from peftcore.errors import RoutingError

if TYPE_CHECKING:
    from peftcore.layers.adapter_layer import AdapterLayer

Below = Callable[[Tensor], Tensor]


def composed_output(
    layer: "AdapterLayer", route: Route, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return the layer's output for x (n, ..., i), each row by its composition in `route`."""
    call = _LayerCall(layer, route, args, kwargs)
    if route.uniform is not None:
        return call.output(route.uniform, x)
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise RoutingError(
            f"{layer.path} is called with more tensors than its input, and it is unknown which rows these belong to; "
            "leave this layer out of target_modules, or give all rows of a batch the same adapter"
        )
    layer.check_rows(x, route)
    groups = route.groups(x)
    inputs = [x.index_select(0, rows) for _, rows in groups]
    chains = [call.chain(one) for one, _ in groups]
    if any(chain is None or _in_weight_space(chain) for chain in chains):
        outputs = [replace(call, rows=rows).output(one, z) for (one, rows), z in zip(groups, inputs, strict=True)]
    else:
        outputs = call.chain_outputs([chain or [] for chain in chains], inputs, x, [rows for _, rows in groups])
    order = torch.cat([rows for _, rows in groups]).argsort()
    return torch.cat(outputs).index_select(0, order)


@dataclass(frozen=True)
class _LayerCall:
    """One call of one layer; rows: indices of the batch rows that are computed, None for all."""

    layer: "AdapterLayer"
    route: Route
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Tensor | None = None

    def chain(self, one: Composition) -> list[Adapter] | None:
        """Return the layer's adapters of a composition that is a chain; None for any other composition."""
        chain = one.chain()
        return None if chain is None else self.layer.in_order(chain)

    def base(self, x: Tensor) -> Tensor:
        """Return the output of the base layer."""
        return self.layer.base_output(x, *self.args, **self.kwargs)

    def chain_outputs(
        self, chains: Sequence[Sequence[Adapter]], inputs: Sequence[Tensor], x: Tensor, rows: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the outputs of each group of rows, from one call of the base."""
        descents = [descend(chain, z) for chain, z in zip(chains, inputs, strict=True)]
        if all(base_input is z for (_, base_input), z in zip(descents, inputs, strict=True)):
            y = self.base(x)
            outputs = [y.index_select(0, group) for group in rows]
        else:
            outputs = list(self.base(torch.cat([z for _, z in descents])).split([len(z) for z in inputs]))
        return [ascend(c, seen, y) for c, (seen, _), y in zip(chains, descents, outputs, strict=True)]

    def output(self, one: Composition, x: Tensor, below: Below | None = None) -> Tensor:
        """Return c(x) on top of `below`; None stands for the base layer."""
        if (adapters := self.chain(one)) is not None:
            return self._chain_on(adapters, x, below)
        if isinstance(one, Stack):
            for child in one.children():
                below = self._on_top(child, below)
            return self.base(x) if below is None else below(x)
        y = self.base(x) if below is None else below(x)
        tokens = y.shape[:-1]
        changes = [(child, self.output(child, x, below) - y) for child in one.children()]
        if isinstance(one, Weighted):
            weighted = [weight * change for (_, weight), (_, change) in zip(one.summands, changes, strict=True)]
        elif isinstance(one, Split):
            masks = [self.route.inside(tokens, self.layer.path, a, b, self.rows) for _, a, b in one.segments]
            weighted = [torch.where(m.unsqueeze(-1), change, 0) for m, (_, change) in zip(masks, changes, strict=True)]
        elif isinstance(one, Gate):
            weights = one.weights(self.layer.path, self.layer.unmerged(), x, tokens).to(y.dtype)
            weighted = [weights[..., number, None] * change for number, (_, change) in enumerate(changes)]
        else:
            raise TypeError(f"{type(one).__name__} is a composition that cannot be evaluated")
        for change in weighted:
            y = y + change
        return y

    def _on_top(self, one: Composition, below: Below | None) -> Below:
        return lambda x: self.output(one, x, below)

    def _chain_on(self, adapters: Sequence[Adapter], x: Tensor, below: Below | None) -> Tensor:
        if below is None and _in_weight_space(adapters):
            return self.layer.chain_output(adapters, x)
        if _in_weight_space(adapters):
            raise RoutingError(
                f"{self.layer.path}: {type(adapters[0]).__name__} changes the base weight there, so it cannot act on "
                "top of a mixture of adapters; put it below, or merge the mixture first"
            )
        inputs, base_input = descend(adapters, x)
        return ascend(adapters, inputs, self.base(base_input) if below is None else below(base_input))


def _in_weight_space(adapters: Sequence[Adapter]) -> bool:
    return any(adapter.weight_space_forward for adapter in adapters)


def descend(chain: Sequence[Adapter], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Apply `before` of each adapter to the input, from the last adapter to the first.

    Returns:
        The input that each adapter got, the last adapter's first, and the input of the base layer.
    """
    inputs = []
    for adapter in reversed(chain):
        inputs.append(x)
        x = adapter.before(x)
    return inputs, x


def ascend(chain: Sequence[Adapter], inputs: Sequence[Tensor], y: Tensor) -> Tensor:
    """Apply `after` from the first adapter to the last, with the inputs that `descend` returned."""
    for adapter, x in zip(chain, reversed(inputs), strict=True):
        y = adapter.after(x, y)
    return y


def composed_weight(one: Composition, weight: Tensor, adapters: Mapping[str, Adapter], path: str) -> Tensor:
    """Return the weight of a raw parameter under a composition: W + Σ wᵢ (cᵢ(W) − W) for a weighted sum.

    Raises:
        RoutingError: the composition depends on tokens (Split, Gate), which one weight for all tokens cannot.
    """
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
        f"{path} is a raw parameter, one weight for all tokens, so a {type(one).__name__} by tokens cannot act on it; "
        "leave this parameter out of target_parameters"
    )
