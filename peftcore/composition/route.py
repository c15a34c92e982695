"""Routes: which row of a batch uses which composition of adapters.

A route is made for one call, or for one `with model.route(...)`, in one thread. The attributes of the current forward
pass (rows, positions) are set before each forward. A row may be repeated, and its copies then stand one after another:
tokens that a model has flattened, the beams of a prompt.

Shapes: B rows of the forward, N compositions (each for B/N consecutive rows), n rows that a layer sees, t tokens of a
row, K adapters, R sum of their ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.composition.algebra import Composition, Gate, Spec, Split, composition
from peftcore.errors import RoutingError

MOST_PLACES = 4
"""Largest number of places by adapter for each row of a batch; with more, most of a product would be of no use."""


class Columns(NamedTuple):
    """The adapters of one stack, of one layer or several; a name occurs once for each layer."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    adapters: Mapping[str, Any]
    """{name: adapter} of the first layer."""

    def by_name(self) -> dict[str, list[int]]:
        """Return {name: its columns}."""
        columns: dict[str, list[int]] = {}
        for column, name in enumerate(self.names):
            columns.setdefault(name, []).append(column)
        return columns


class Mask(NamedTuple):
    """Weights of x Aᵀ (n·t, R): (N, 1, R) by rows, or (1, n·t, R) by tokens."""

    weights: Tensor | None
    """None if all weights are 0 or 1."""
    zero: Tensor
    """True where the weight is 0; these values are filled with 0, because they may be NaN."""

    def apply(self, h: Tensor) -> Tensor:
        """Return h (n·t, R), weighted in place."""
        by_row = h.view(self.zero.shape[0], -1, h.shape[1])
        if self.weights is not None:
            by_row.mul_(self.weights)
        by_row.masked_fill_(self.zero, 0)
        return h


class Blocks(NamedTuple):
    """Rows grouped by adapter: each adapter of a stack has as many places as the adapter with most rows has rows."""

    adapters: int
    """Adapters of the stack (count): K."""
    rows: int
    """Compositions (count): N."""
    row_of_place: Tensor | None
    """(P,): the row in each place, by adapter; any row in an empty place. None: the rows in order fill all places."""
    places: Tensor | None
    """(M,): the place of each row with an adapter."""
    of_rows: Tensor | None
    """(M,): these rows; None if all rows have an adapter."""

    def grouped(self, x: Tensor) -> Tensor:
        """Return the tokens x (n·t, i) by adapter (K, tokens, i)."""
        places = x if self.row_of_place is None else x.view(self.rows, -1).index_select(0, self.row_of_place)
        return places.view(self.adapters, -1, x.shape[-1])

    def add_products(self, y: Tensor, h: Tensor, b: Tensor) -> None:
        """Add h (K, tokens, r) b (K, r, o), which are by adapter, to the outputs y (n·t, o) of their rows in place."""
        if self.row_of_place is None:
            by_adapter = y.view(self.adapters, -1, y.shape[1])
            if y.dtype == b.dtype:
                by_adapter.baddbmm_(h, b)
            else:
                by_adapter.add_(h.bmm(b))
            return
        assert self.places is not None
        change = h.bmm(b).view(len(self.row_of_place), -1).index_select(0, self.places)
        by_row = y.view(self.rows, -1)
        if self.of_rows is None:
            by_row.add_(change)
        else:
            by_row.index_add_(0, self.of_rows, change.to(y.dtype))


class Run(NamedTuple):
    """Consecutive tokens with one composition: `start` to `stop` - 1, counted over the concatenated rows."""

    start: int
    stop: int
    weights: Mapping[str, float]
    """{adapter: weight} of the run's composition."""


class Route:
    """The compositions of a batch's rows.

    Args:
        specs: one composition for all rows, or a list with one for each row.
    """

    def __init__(self, specs: Spec | Sequence[Spec]):
        self.per_row = isinstance(specs, list | tuple)
        self.compositions = tuple(composition(one) for one in specs) if self.per_row else (composition(specs),)  # type: ignore[union-attr,arg-type]
        if not self.compositions:
            raise RoutingError("a route for no rows: give a name, or a list with one name for each row of the batch")
        self.uniform: Composition | None = self.compositions[0] if len(set(self.compositions)) == 1 else None
        """The composition of every row; None if rows differ."""
        self.chain = None if self.uniform is None else self.uniform.chain()
        """The names of the adapters, in order, if every row has the same chain; else None."""
        self.names = tuple(sorted({name for one in self.compositions for name in one.names()}))
        self.has_gates = any(_is_or_has(one, Gate) for one in self.compositions)
        self.needs_positions = any(_is_or_has(one, Split) for one in self.compositions)
        self.depends_on_tokens = self.has_gates or self.needs_positions
        self.run_count = 0 if self.uniform is not None or self.depends_on_tokens else len(self._row_runs())
        """Number of runs of consecutive rows with one composition; 0 if the layers cannot be computed run by run."""
        self.plans: dict[Any, Any] = {}
        """{layer: its plan} under these compositions; see `peftcore.layers.forward_paths`."""
        self.model: nn.Module | None = None
        """The routed model, from which a layer's batch axis is inferred."""
        self.is_final = False
        """True inside of `disable_adapter`, where no adapter may be used."""
        self.repeats = False
        """True if each row may be repeated, as `generate` does with beams."""
        self.rows: int | None = None
        """B; None outside of the model's own forward."""
        self.flattened: frozenset[int] = frozenset()
        """Numbers of rows that a layer sees if the model has flattened the batch into tokens."""
        self.positions: Tensor | None = None
        """(B, T): position of each token in its row's text; set only if a Split needs it."""
        self.prompts: list[Any] | None = None
        """The prompt learners of the rows, made at their first use."""
        self._masks: dict[Any, Mask] = {}
        self._runs: dict[int, list[Run]] = {}
        self._groups: dict[Any, list[tuple[Composition, Tensor]]] = {}

    def check_rows(self, rows: int) -> None:
        """Raise RoutingError if the number of compositions does not fit a batch of `rows` rows."""
        count = len(self.compositions)
        if self.per_row and rows != count and not (self.repeats and rows and rows % count == 0):
            raise RoutingError(
                f"{count} adapter names for a batch of {rows} rows; give one for each row (None or "
                "'__base__' for the base)"
            )

    def begin(self, rows: int, positions: Tensor | None) -> None:
        """Set the attributes of a forward pass; called before each forward of the model.

        Args:
            rows: B (count).
            positions: see the attribute.
        """
        self.check_rows(rows)
        self.rows, self.positions = rows, positions
        if self.depends_on_tokens:
            self._masks = {}

    def rows_of(self, name: str) -> list[int]:
        """Return the indices of the compositions that an adapter is in."""
        return [number for number, one in enumerate(self.compositions) if name in one.names()]

    def expanded(self, numbers: Sequence[int], rows: int) -> Tensor:
        """Return the indices of the batch rows that belong to some of the N compositions.

        Args:
            numbers: indices of compositions.
            rows: B (count).
        """
        each = rows // len(self.compositions)
        return torch.cat([torch.arange(number * each, (number + 1) * each) for number in numbers])

    def shares(self, name: str, rows: int) -> Tensor:
        """Return the weight (B,) of an adapter in each row, for an adapter that acts on whole rows (prompts).

        Args:
            name: the adapter.
            rows: B (count).

        Raises:
            RoutingError: a composition weights the adapter by tokens.
        """
        weights = torch.zeros(len(self.compositions))
        for number, one in enumerate(self.compositions):
            for term in one.terms():
                if term.name == name and (term.gates or (term.start, term.stop) != (0, math.inf)):
                    raise RoutingError(
                        f"{name!r} acts on whole rows, and {one!r} weights tokens; compose it without Split and Gate"
                    )
                weights[number] += term.weight if term.name == name else 0
        return weights.repeat_interleave(rows // len(self.compositions))

    # -- for one layer ---------------------------------------------------------------------------------

    def groups(self, x: Tensor) -> list[tuple[Composition, Tensor]]:
        """Return [(composition, indices of its rows of x (n, ...))], each composition once.

        The rows must have been checked (`LayerWrapper.check_rows`).
        """
        key = (len(x), x.device)
        if key not in self._groups:
            numbers: dict[Composition, list[int]] = {}
            for number, one in enumerate(self.compositions):
                numbers.setdefault(one, []).append(number)
            rows = {one: self.expanded(own, len(x)).to(x.device) for one, own in numbers.items()}
            self._groups[key] = list(rows.items())
        return self._groups[key]

    def runs(self, tokens: int) -> list[Run]:
        """Return the runs of consecutive tokens with one composition, for a layer's input of `tokens` tokens."""
        if tokens not in self._runs:
            each = tokens // len(self.compositions)
            self._runs[tokens] = [
                Run(start * each, stop * each, _weights(self.compositions[start])) for start, stop in self._row_runs()
            ]
        return self._runs[tokens]

    def _row_runs(self) -> list[tuple[int, int]]:
        """Return (first, last + 1) of each run of equal consecutive compositions."""
        starts = [n for n, one in enumerate(self.compositions) if not n or one != self.compositions[n - 1]]
        return list(zip(starts, [*starts[1:], len(self.compositions)], strict=True))

    def mask(self, x: Tensor, path: str, columns: Columns, dtype: torch.dtype) -> Mask:
        """Return the mask of a stack.

        Args:
            x: the layer's input (n, ..., i), which gates read.
            path: the layer's path.
            columns: the adapters of the stack.
            dtype: the type that the adapters are computed in.
        """
        tokens = x.shape[:-1] if self.depends_on_tokens else None
        key = (columns.names, columns.ranks, dtype, x.device, tokens)
        mask = self._masks.get(key)
        if mask is None:
            weights = self._by_tokens(x, path, columns, dtype) if self.depends_on_tokens else self._by_rows(columns)
            weights = weights.to(x.device, dtype)
            weights = weights.repeat_interleave(torch.tensor(columns.ranks, device=x.device), -1)
            plain = not self.depends_on_tokens and bool(((weights == 0) | (weights == 1)).all())
            mask = Mask(None if plain else weights, weights == 0)
            if not self.has_gates:
                self._masks[key] = mask
        return mask

    def blocks(self, adapters: Iterable[str], device: torch.device) -> Blocks | None:
        """Return the rows grouped by adapter.

        Args:
            adapters: their names, in the order of the stack; rows may use only some of them.
            device: where the indices are made.

        Returns:
            None unless each row has one adapter with weight 1, or none, and if too many places would be empty.
        """
        names, weights = list(adapters), [_weights(one) for one in self.compositions]
        if (
            self.uniform is not None
            or self.depends_on_tokens
            or any(list(one.values()) not in ([1], []) for one in weights)
        ):
            return None
        rows_of: dict[str, list[int]] = {name: [] for name in names}
        for row, one in enumerate(weights):
            for name in one:
                if name in rows_of:  # otherwise this layer does not have the adapter
                    rows_of[name].append(row)
        most = max(map(len, rows_of.values()))
        if not 0 < most * len(names) <= MOST_PLACES * len(weights):
            return None
        filled = [rows + [0] * (most - len(rows)) for rows in rows_of.values()]
        row_of_place = [row for rows in filled for row in rows]
        if row_of_place == list(range(len(weights))):
            return Blocks(len(names), len(weights), None, None, None)
        place_of = {row: most * k + n for k, rows in enumerate(rows_of.values()) for n, row in enumerate(rows)}
        of_rows = sorted(place_of)
        places = torch.tensor([place_of[row] for row in of_rows], device=device)
        all_rows = len(of_rows) == len(weights)
        return Blocks(
            len(names),
            len(weights),
            torch.tensor(row_of_place, device=device),
            places,
            None if all_rows else torch.tensor(of_rows, device=device),
        )

    def _by_rows(self, columns: Columns) -> Tensor:
        """Return weights (N, 1, adapters)."""
        compositions = self.compositions if self.uniform is None else (self.uniform,)
        weights, by_name = torch.zeros(len(compositions), 1, len(columns.names)), columns.by_name()
        for row, one in enumerate(compositions):
            for name, weight in _weights(one).items():
                for column in by_name.get(name, ()):
                    weights[row, 0, column] = weight
        return weights

    def _by_tokens(self, x: Tensor, path: str, columns: Columns, dtype: torch.dtype) -> Tensor:
        """Return weights (1, n·t, adapters)."""
        tokens = x.shape[:-1].numel()
        weights = x.new_zeros(1, tokens, len(columns.names), dtype=dtype)
        gates: dict[Gate, Tensor] = {}
        by_name = columns.by_name()
        for one, rows in self.groups(x):
            is_own = torch.zeros(len(x), dtype=dtype, device=x.device)
            is_own[rows] = 1
            of_row = is_own[:, None].expand(len(x), tokens // len(x)).reshape(-1)
            for term in one.terms():
                weight = of_row * term.weight
                if (term.start, term.stop) != (0, math.inf):
                    weight = weight * self.inside(x.shape[:-1], path, term.start, term.stop).view(-1).to(weight)
                for gate, number in term.gates:
                    if gate not in gates:
                        gated = gate.weights(path, columns.adapters, x, x.shape[:-1])
                        gates[gate] = gated.reshape(tokens, -1).to(dtype)
                    weight = weight * gates[gate][:, number]
                for column in by_name.get(term.name, ()):
                    weights[0, :, column] += weight
        return weights

    def inside(self, tokens: Sequence[int], path: str, start: float, stop: float, rows: Tensor | None = None) -> Tensor:
        """Return a mask (n, t) or (n·t,), True for the tokens at positions from `start` to before `stop`.

        Args:
            tokens: the shape of the layer's input without its features.
            path: the layer's path, for errors.
            start: first position.
            stop: position after the last.
            rows: indices of the batch rows that the layer sees; None for all.

        Raises:
            RoutingError: the layer's tokens cannot be matched with the positions of the batch's text.
        """
        positions = self.positions
        if positions is not None and rows is not None and len(tokens) > 1:
            positions = positions.to(rows.device)[rows]
        elif positions is not None and rows is not None:
            positions = positions.to(rows.device).view(-1)[rows]
        if positions is None or positions.numel() != math.prod(tokens):
            raise RoutingError(
                f"{path} sees tokens {tuple(tokens)}, and the batch's text is "
                f"{None if self.positions is None else tuple(self.positions.shape)}, so the positions of its tokens "
                "are unknown; leave this layer out of target_modules, or do not use Split"
            )
        positions = positions.view(*tokens)
        return (positions >= start) & (positions < stop)


def _weights(one: Composition) -> dict[str, float]:
    """Return {adapter: weight} of a composition, for adapters that only add ΔW x."""
    weights: dict[str, float] = {}
    for term in one.terms():
        weights[term.name] = weights.get(term.name, 0.0) + term.weight
    return weights


def _is_or_has(one: Composition, kind: type[Composition]) -> bool:
    return isinstance(one, kind) or any(_is_or_has(child, kind) for child in one.children())
