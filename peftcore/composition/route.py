"""Which rows of a batch are computed by which composition, and how that looks to one layer.

A route is made for one call, or for one `with model.route(...)`, by one thread. What it tells of the forward that runs
now (rows, positions) is set before each one. Layers may see a row several times, one after another: tokens that a model
has flattened, the beams of a prompt.

Shapes: B rows of the forward, N compositions given (each for B/N rows in turn), n rows that a layer sees, K adapters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from peftcore.composition.algebra import Composition, Gate, Spec, Split, composition
from peftcore.detection.layer_inputs import rows_come_first
from peftcore.errors import RoutingError


class RoutedLayer(Protocol):
    """What a route asks of a layer."""

    path: str
    rows_first: bool | None
    """Whether it sees rows before their tokens; None: not known yet."""

    def sees_tokens(self, x: Tensor) -> bool:
        """Whether an input of this shape has an axis of tokens besides that of rows."""
        ...


class Columns(NamedTuple):
    """Adapters whose A are stacked, of one layer or of several; an adapter's name stands once for each layer."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    adapters: Mapping[str, Any]
    """{name: adapter} at the layer itself."""

    def places(self) -> dict[str, list[int]]:
        """Where each name stands."""
        found: dict[str, list[int]] = {}
        for column, name in enumerate(self.names):
            found.setdefault(name, []).append(column)
        return found


class Mask(NamedTuple):
    """What (A x) (n·t, R) of all adapters together is weighed with: (N, 1, R), or (1, n·t, R) by tokens."""

    weights: Tensor | None
    """None where they are 0 and 1 alone."""
    zero: Tensor
    """Where the weight is 0: what another row's adapter has made of this one may be no number, and stays out."""

    def apply(self, h: Tensor) -> Tensor:
        """h (n·t, R), weighed in place."""
        own = h.view(self.zero.shape[0], -1, h.shape[1])
        if self.weights is not None:
            own.mul_(self.weights)
        own.masked_fill_(self.zero, 0)
        return h


class Blocks(NamedTuple):
    """Rows sorted so that those of an adapter lie together, where each adapter has as many."""

    adapters: int
    """How many (count)."""
    order: Tensor | None
    """(N,): the compositions by their adapter; None where they are so already."""
    back: Tensor | None

    def sorted(self, x: Tensor) -> Tensor:
        """x (n, ...), by adapter."""
        return x if self.order is None else x.reshape(len(self.order), -1).index_select(0, self.order).view(x.shape)

    def unsorted(self, y: Tensor) -> Tensor:
        """y (n·t, o), sorted like x, in the order that x had."""
        return y if self.back is None else y.view(len(self.back), -1).index_select(0, self.back).view(y.shape)


class Run(NamedTuple):
    """Tokens of x, all rows laid one after another, from `start` to before `stop`."""

    start: int
    stop: int
    weights: Mapping[str, float]
    """Of each adapter in their composition."""


class Route:
    """What `given` asks for: one composition for all rows, or a list with one for each."""

    def __init__(self, given: Spec | Sequence[Spec]):
        self.per_row = isinstance(given, list | tuple)
        self.compositions = tuple(composition(one) for one in given) if self.per_row else (composition(given),)  # type: ignore[union-attr,arg-type]
        if not self.compositions:
            raise RoutingError("a route for no rows: give a name, or a list with one name for each row of the batch")
        self.uniform: Composition | None = self.compositions[0] if len(set(self.compositions)) == 1 else None
        """What every row gets, where that is the same."""
        self.chain = None if self.uniform is None else self.uniform.chain()
        """The adapters that act one on top of another in every row, where that is all; else None."""
        self.names = tuple(sorted({name for one in self.compositions for name in one.names()}))
        self.has_gates = any(_is_or_has(one, Gate) for one in self.compositions)
        self.needs_positions = any(_is_or_has(one, Split) for one in self.compositions)
        self.depends_on_tokens = self.has_gates or self.needs_positions
        self.stretches = 0 if self.uniform is not None or self.depends_on_tokens else len(self._stretches())
        """Rows one after another with one composition (count); 0 where these are not what is to be computed."""
        self.plans: dict[Any, Any] = {}
        """What `peftcore.layers.fast_path` knows of each layer under these compositions."""
        self.model: nn.Module | None = None
        """The model that is routed, to look at the surroundings of a layer."""
        self.is_final = False
        """Whether no adapter may act inside of it, as in `disable_adapter`."""
        self.repeats = False
        """Whether each row may stand several times, one after another, as `generate` does with beams."""
        self.rows: int | None = None
        """B, where the model's own forward runs."""
        self.flattened: frozenset[int] = frozenset()
        """How many rows a layer sees where the model has laid all tokens of the batch one after another."""
        self.positions: Tensor | None = None
        """(B, T): each token's place in its row's text, where a Split asks for it."""
        self.prompts: list[Any] | None = None
        """What stands for the rows' prompts, once it has been made."""
        self._masks: dict[Any, Mask] = {}
        self._runs: dict[int, list[Run]] = {}
        self._groups: dict[Any, list[tuple[Composition, Tensor]]] = {}

    def check_rows(self, rows: int) -> None:
        """RoutingError unless the compositions can be given out to a batch of so many rows."""
        given = len(self.compositions)
        if self.per_row and rows != given and not (self.repeats and rows and rows % given == 0):
            raise RoutingError(
                f"{given} adapter names for a batch of {rows} rows; give one for each row (None or "
                "'__base__' for the base)"
            )

    def begin(self, rows: int, positions: Tensor | None) -> None:
        """Told before each forward of the model."""
        self.check_rows(rows)
        self.rows, self.positions = rows, positions
        if self.depends_on_tokens:
            self._masks = {}

    def rows_of(self, name: str) -> list[int]:
        """Which of the N compositions an adapter is in."""
        return [number for number, one in enumerate(self.compositions) if name in one.names()]

    def expanded(self, numbers: Sequence[int], rows: int) -> Tensor:
        """Rows of a batch of `rows` that belong to some of the N compositions."""
        each = rows // len(self.compositions)
        return torch.cat([torch.arange(number * each, (number + 1) * each) for number in numbers])

    def shares(self, name: str, rows: int) -> Tensor:
        """(B,): the weight of an adapter in each row, for what is added to the output as a whole."""
        weights = torch.zeros(len(self.compositions))
        for number, one in enumerate(self.compositions):
            for term in one.terms():
                if term.name == name and (term.gates or (term.start, term.stop) != (0, math.inf)):
                    raise RoutingError(f"{name!r} acts on whole rows, and {one!r} tells tokens apart; do without it")
                weights[number] += term.weight if term.name == name else 0
        return weights.repeat_interleave(rows // len(self.compositions))

    # -- how it looks to a layer ---------------------------------------------------------------------------------

    def groups(self, x: Tensor) -> list[tuple[Composition, Tensor]]:
        """[(composition, the rows of x (n, ...) that it computes)], each composition once; see `check_layer`."""
        key = (len(x), x.device)
        if key not in self._groups:
            numbers: dict[Composition, list[int]] = {}
            for number, one in enumerate(self.compositions):
                numbers.setdefault(one, []).append(number)
            own = {one: self.expanded(found, len(x)).to(x.device) for one, found in numbers.items()}
            self._groups[key] = list(own.items())
        return self._groups[key]

    def check_layer(self, x: Tensor, layer: RoutedLayer) -> None:
        """RoutingError where it cannot be told whose rows a layer sees."""
        if self.uniform is not None:
            return
        rows = self.rows or len(self.compositions)
        known = self.rows is not None
        fits = len(x) == rows or (len(x) in self.flattened and x.dim() == 2 if known else len(x) % rows == 0)
        if not fits:
            raise RoutingError(
                f"{layer.path} sees {len(x)} rows where the batch has {rows}, so it cannot be told whose they are; "
                "leave this layer out of target_modules, or give all rows of a batch the same adapter"
            )
        if x.dim() > 1 and x.shape[1] == rows and layer.sees_tokens(x) and not self._rows_come_first(layer):
            raise RoutingError(
                f"{layer.path} sees {tuple(x.shape[:2])} where the batch has {rows} rows, so its rows may be the first "
                "or the second axis; give the model, or the module around this layer, the attribute batch_first=True "
                "if they are the first, or give all rows of a batch the same adapter"
            )
        if layer.rows_first is None and x.dim() == 3 and len(x) == self.rows != x.shape[1]:
            layer.rows_first = True

    def _rows_come_first(self, layer: RoutedLayer) -> bool:
        if layer.rows_first is None and self.model is not None:
            layer.rows_first = rows_come_first(self.model, layer.path)
        return bool(layer.rows_first)

    def runs(self, tokens: int) -> list[Run]:
        """The stretches of a layer's tokens (count) that have one composition each."""
        if tokens not in self._runs:
            each = tokens // len(self.compositions)
            self._runs[tokens] = [
                Run(start * each, stop * each, _weights(self.compositions[start])) for start, stop in self._stretches()
            ]
        return self._runs[tokens]

    def _stretches(self) -> list[tuple[int, int]]:
        """(first, after the last) of the compositions that are one after another the same."""
        starts = [n for n, one in enumerate(self.compositions) if not n or one != self.compositions[n - 1]]
        return list(zip(starts, [*starts[1:], len(self.compositions)], strict=True))

    def mask(self, x: Tensor, path: str, columns: Columns, dtype: torch.dtype) -> Mask:
        """For what a layer's input x is to all adapters together, in the type that they are computed in."""
        key = (columns.names, columns.ranks, dtype, x.device)
        found = self._masks.get(key)
        if found is None:
            weights = self._by_tokens(x, path, columns, dtype) if self.depends_on_tokens else self._by_rows(columns)
            weights = weights.to(x.device, dtype)
            weights = weights.repeat_interleave(torch.tensor(columns.ranks, device=x.device), -1)
            plain = not self.depends_on_tokens and bool(((weights == 0) | (weights == 1)).all())
            found = Mask(None if plain else weights, weights == 0)
            if not self.has_gates:
                self._masks[key] = found
        return found

    def blocks(self, columns: Columns, device: torch.device) -> Blocks | None:
        """How rows lie by adapter; None unless each has one, with weight 1, and all these equally many."""
        names, weights = list(columns.adapters), [_weights(one) for one in self.compositions]
        if self.uniform is not None or self.depends_on_tokens or any(list(own.values()) != [1] for own in weights):
            return None
        adapters = [next(iter(own)) for own in weights]
        if set(adapters) != set(names) or len({adapters.count(name) for name in names}) > 1:
            return None
        order = sorted(range(len(adapters)), key=lambda row: names.index(adapters[row]))
        if order == list(range(len(order))):
            return Blocks(len(names), None, None)
        by_adapter = torch.tensor(order, device=device)
        return Blocks(len(names), by_adapter, by_adapter.argsort())

    def _by_rows(self, columns: Columns) -> Tensor:
        """(N, 1, adapters)"""
        compositions = self.compositions if self.uniform is None else (self.uniform,)
        weights, places = torch.zeros(len(compositions), 1, len(columns.names)), columns.places()
        for row, one in enumerate(compositions):
            for name, weight in _weights(one).items():
                for column in places.get(name, ()):
                    weights[row, 0, column] = weight
        return weights

    def _by_tokens(self, x: Tensor, path: str, columns: Columns, dtype: torch.dtype) -> Tensor:
        """(1, n·t, adapters)"""
        tokens = x.shape[:-1].numel()
        weights = x.new_zeros(1, tokens, len(columns.names), dtype=dtype)
        gates: dict[Gate, Tensor] = {}
        places = columns.places()
        for one, rows in self.groups(x):
            own = torch.zeros(len(x), dtype=dtype, device=x.device)
            own[rows] = 1
            of_row = own[:, None].expand(len(x), tokens // len(x)).reshape(-1)
            for term in one.terms():
                weight = of_row * term.weight
                if (term.start, term.stop) != (0, math.inf):
                    weight = weight * self.inside(x.shape[:-1], path, term.start, term.stop).view(-1).to(weight)
                for gate, number in term.gates:
                    if gate not in gates:
                        given = gate.weights(path, columns.adapters, x, x.shape[:-1])
                        gates[gate] = given.reshape(tokens, -1).to(dtype)
                    weight = weight * gates[gate][:, number]
                for column in places.get(term.name, ()):
                    weights[0, :, column] += weight
        return weights

    def inside(self, tokens: Sequence[int], path: str, start: float, stop: float, rows: Tensor | None = None) -> Tensor:
        """(n, t) or (n·t,) bool: which tokens stand from `start` to before `stop`; rows: of the batch, None for all.

        tokens: the shape of the layer's input without its features.
        """
        positions = self.positions
        if positions is not None and rows is not None and len(tokens) > 1:
            positions = positions.to(rows.device)[rows]
        elif positions is not None and rows is not None:
            positions = positions.to(rows.device).view(-1)[rows]
        if positions is None or positions.numel() != math.prod(tokens):
            raise RoutingError(
                f"{path} sees tokens {tuple(tokens)}, and the batch's text is "
                f"{None if self.positions is None else tuple(self.positions.shape)}, so positions cannot be told apart "
                "there; leave this layer out of target_modules, or do without Split"
            )
        positions = positions.view(*tokens)
        return (positions >= start) & (positions < stop)


def _weights(one: Composition) -> dict[str, float]:
    """Of each adapter, where all of them only add ΔW x."""
    found: dict[str, float] = {}
    for term in one.terms():
        found[term.name] = found.get(term.name, 0.0) + term.weight
    return found


def _is_or_has(one: Composition, kind: type[Composition]) -> bool:
    return isinstance(one, kind) or any(_is_or_has(child, kind) for child in one.children())
