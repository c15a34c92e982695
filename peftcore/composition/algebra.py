"""Compositions of adapters. A composition turns a layer f into another layer; f is the base, or the composition below.

    Only(a)          a on top of f: after_a(x, f(before_a(x)))
    Stack(a, b)      b on top of a on top of f, like `set_adapter([a, b])`
    Weighted         f(x) + Σ wᵢ (cᵢ(x) − f(x)), weights of any sign; for LoRA exactly the weighted sum of the ΔW
    Parallel(a, b)   Weighted with every weight 1: each adapter sees f and not the other
    Average(a, b)    Weighted with every weight 1/n
    Split            by position in the text: the first n tokens use one adapter, the next tokens another
    Gate             Weighted with weights from a function, for each token at each layer

Compositions nest, compare and hash by value. `0.7 * Only("sql") - 0.2 * Only("toxic")` is a Weighted.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, NamedTuple, SupportsFloat, Union

from torch import Tensor

from peftcore.errors import RoutingError

BASE_NAME = "__base__"
"""PEFT's name for the base model; None means the base model too."""
Spec = Union["Composition", str, None, Mapping[Any, float]]
"""A composition, or short for one: an adapter's name, None for the base, or {name: weight}."""
Gating = Callable[[str, Mapping[str, Any], Tensor], Tensor]
"""(path of a layer, {name: the layer's adapter}, x (..., i)) -> weights (..., k), in the order of the names."""


class Composition(ABC):
    """Base class of the forms above; immutable."""

    def names(self) -> Iterator[str]:
        """Yield the names of its adapters, in order; an adapter that occurs twice is yielded twice."""
        for child in self.children():
            yield from child.names()

    def children(self) -> Sequence["Composition"]:
        """Return the compositions that it is made of."""
        return ()

    def chain(self) -> tuple[str, ...] | None:
        """Return the adapters in order, if the composition is a plain chain of them; else None."""
        return None

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> "Composition":
        """Return the composition with other adapter names.

        Args:
            names: {old name: new name}; other names stay.
        """

    @abstractmethod
    def terms(self) -> Iterator["Term"]:
        """Yield the terms of Σ weight x ΔW x, which the composition equals if its adapters only add ΔW x."""

    def __add__(self, other: "Composition") -> "Weighted":
        return Weighted([*_summands(self), *_summands(other)])

    def __sub__(self, other: "Composition") -> "Weighted":
        return self + -1.0 * other

    def __mul__(self, factor: float) -> "Weighted":
        return Weighted([(child, factor * weight) for child, weight in _summands(self)])

    __rmul__ = __mul__


class Term(NamedTuple):
    """One summand: weight x ΔW x of an adapter, at tokens from `start` to before `stop`, times the gates' weights."""

    name: str
    weight: float
    start: float = 0
    stop: float = math.inf
    gates: tuple[tuple["Gate", int], ...] = ()
    """(gate, index of the adapter among its members)"""


@dataclass(frozen=True)
class Only(Composition):
    """One adapter, by its name."""

    name: str

    def names(self) -> Iterator[str]:
        """Yield the name."""
        yield self.name

    def chain(self) -> tuple[str, ...]:
        """Return the name alone."""
        return (self.name,)

    def renamed(self, names: Mapping[str, str]) -> Composition:
        return Only(names.get(self.name, self.name))

    def terms(self) -> Iterator[Term]:
        yield Term(self.name, 1.0)


class Stack(Composition):
    """Each composition on top of the one before; an empty stack is the base.

    Args:
        children: the compositions, the lowest first.
    """

    def __init__(self, *children: Spec):
        self._parts = tuple(composition(child) for child in children)

    def children(self) -> Sequence[Composition]:
        return self._parts

    def chain(self) -> tuple[str, ...] | None:
        chains = [child.chain() for child in self._parts]
        names = [name for chain in chains for name in chain or ()]
        return None if None in chains or len(set(names)) < len(names) else tuple(names)

    def renamed(self, names: Mapping[str, str]) -> Composition:
        return Stack(*[child.renamed(names) for child in self._parts])

    def terms(self) -> Iterator[Term]:
        for child in self._parts:
            yield from child.terms()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self._parts))})"


class Weighted(Composition):
    """The weighted sum f(x) + Σ wᵢ (cᵢ(x) − f(x)).

    Args:
        weights: {name or composition: weight}, or pairs of these; weights of any sign.

    Raises:
        RoutingError: a weight is no finite number.
    """

    def __init__(self, weights: Mapping[Any, float] | Sequence[tuple[Any, float]]):
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        for child, weight in pairs:
            if not isinstance(weight, SupportsFloat) or not math.isfinite(weight):
                raise RoutingError(f"the weight of {child!r} is {weight!r}; give a finite number")
        self.summands = tuple((composition(child), float(weight)) for child, weight in pairs)

    def children(self) -> Sequence[Composition]:
        return [child for child, _ in self.summands]

    def renamed(self, names: Mapping[str, str]) -> Composition:
        return Weighted([(child.renamed(names), weight) for child, weight in self.summands])

    def terms(self) -> Iterator[Term]:
        for child, weight in self.summands:
            for term in child.terms():
                yield term._replace(weight=weight * term.weight)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weighted) and self.summands == other.summands

    def __hash__(self) -> int:
        return hash(self.summands)

    def __repr__(self) -> str:
        return f"Weighted([{', '.join(f'({child!r}, {weight:g})' for child, weight in self.summands)}])"


def Parallel(*children: Spec) -> Weighted:
    """Return the sum of the adapters' changes: each adapter sees the layer below and not the other adapters."""
    return Weighted([(child, 1.0) for child in children])


def Average(*children: Spec) -> Weighted:
    """Return the mean of the outputs of each adapter alone.

    Raises:
        RoutingError: no adapter is given.
    """
    if not children:
        raise RoutingError("Average: give at least one adapter")
    return Weighted([(child, 1.0 / len(children)) for child in children])


class Split(Composition):
    """Adapters by position in the text: `Split(sql=64, chat=...)` or `Split(("sql", 64), ("chat", ...))`.

    Positions count from the first token of a row that is not padding, and go on for decoded tokens. Positions in no
    segment use the base.

    Args:
        parts: (composition, its number of tokens); `...` as the number takes the rest.
        named: the same by adapter name.

    Raises:
        RoutingError: no number, a number below 1, or a segment after `...`.
    """

    def __init__(self, *parts: tuple[Spec, int | EllipsisType], **named: int | EllipsisType):
        self.segments: tuple[tuple[Composition, float, float], ...] = ()
        """(composition, first position, position after the last)"""
        start = 0.0
        for part in [*parts, *named.items()]:
            if not isinstance(part, tuple) or len(part) != 2:
                raise RoutingError(
                    f"Split: {part!r} has no number of tokens; give pairs, such as ('sql', 64), and ('chat', ...) for "
                    "the rest"
                )
            child, length = part
            if not isinstance(length, EllipsisType) and (isinstance(length, bool) or length < 1):
                raise RoutingError(f"Split: {child!r} has {length!r} tokens; give at least 1, or ... for the rest")
            stop = math.inf if isinstance(length, EllipsisType) else start + length
            if start == math.inf:
                raise RoutingError(f"Split: {child!r} comes after `...`, which took the rest; put `...` last")
            self.segments += ((composition(child), start, stop),)
            start = stop

    def children(self) -> Sequence[Composition]:
        return [child for child, _, _ in self.segments]

    def renamed(self, names: Mapping[str, str]) -> Composition:
        split = Split()
        split.segments = tuple((child.renamed(names), start, stop) for child, start, stop in self.segments)
        return split

    def terms(self) -> Iterator[Term]:
        for child, start, stop in self.segments:
            for term in child.terms():
                if max(start, term.start) < min(stop, term.stop):
                    yield term._replace(start=max(start, term.start), stop=min(stop, term.stop))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and self.segments == other.segments

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        return f"Split({', '.join(f'({c!r}, {stop - start:g})' for c, start, stop in self.segments)})"


@dataclass(frozen=True)
class Gate(Composition):
    """The gated sum f(x) + Σ gᵢ(x) (cᵢ(x) − f(x)): weights for each token at each layer, from the layer's input.

    Attributes:
        members: names of the adapters.
        gating: the function that computes the weights; see `Gating`.
        top_k: number of the largest weights that are kept (count), rescaled to the sum of all; None keeps all.
            Weights whose sum is 0 are not rescaled.
    """

    members: tuple[str, ...]
    gating: Gating
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) < len(self.members):
            raise RoutingError(f"Gate: give at least one adapter, each once; got {list(self.members)}")
        if self.top_k is not None and not 1 <= self.top_k <= len(self.members):
            raise RoutingError(f"Gate: top_k must be from 1 to {len(self.members)}, got {self.top_k}")

    def children(self) -> Sequence[Composition]:
        return [Only(name) for name in self.members]

    def renamed(self, names: Mapping[str, str]) -> Composition:
        return Gate(tuple(names.get(name, name) for name in self.members), self.gating, self.top_k)

    def terms(self) -> Iterator[Term]:
        for number, name in enumerate(self.members):
            yield Term(name, 1.0, gates=((self, number),))

    def weights(self, path: str, adapters: Mapping[str, Any], x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the weight (*tokens, k) of every member; 0 for members that the layer does not have.

        Args:
            path: the layer's path.
            adapters: {name: adapter} of the layer.
            x: the layer's input (*tokens, i), or token ids (*tokens).
            tokens: the shape of the input without its features.

        Raises:
            RoutingError: the gating function returned weights of another shape.
        """
        present = [name for name in self.members if name in adapters]
        weights = self.gating(path, {name: adapters[name] for name in present}, x)
        if weights.shape != (*tokens, len(present)):
            raise RoutingError(
                f"the gate returned weights {tuple(weights.shape)} at {path} for x {tuple(x.shape)} and {len(present)} "
                f"adapters; return {(*tokens, len(present))}"
            )
        if self.top_k is not None and self.top_k < len(present):
            largest, indices = weights.topk(self.top_k, dim=-1)
            kept = largest.sum(-1, keepdim=True)
            no_sum = kept == 0  # filled before the division, whose gradient would be NaN
            ratio = weights.sum(-1, keepdim=True) / kept.masked_fill(no_sum, 1.0)
            weights = weights.new_zeros(weights.shape).scatter(-1, indices, largest * ratio.masked_fill(no_sum, 1.0))
        of_members = weights.new_zeros(*weights.shape[:-1], len(self.members))
        of_members[..., [self.members.index(name) for name in present]] = weights
        return of_members


BASE = Stack()
"""The composition of the base model alone."""


def composition(spec: Spec) -> Composition:
    """Return the composition that a specification stands for.

    Raises:
        RoutingError: the specification is of another type.
    """
    if isinstance(spec, Composition):
        return spec
    if spec is None or spec == BASE_NAME:
        return BASE
    if isinstance(spec, str):
        return Only(spec)
    if isinstance(spec, Mapping):
        return Weighted(spec)
    raise RoutingError(
        f"{spec!r} is no composition of adapters; give a name, None for the base, {{name: weight}}, or "
        "Stack, Weighted, Parallel, Average, Split or Gate"
    )


def weights_of(one: Composition) -> dict[str, float]:
    """Return {adapter: weight} of a weighted sum, nested ones included.

    Raises:
        RoutingError: the composition is not a weighted sum.
    """
    if isinstance(one, Only):
        return {one.name: 1.0}
    if not isinstance(one, Weighted):
        raise RoutingError(
            f"{one!r} is not a weighted sum, and only those can be merged into one adapter; use it in a route"
        )
    weights: dict[str, float] = {}
    for child, weight in one.summands:
        for name, inner in weights_of(child).items():
            weights[name] = weights.get(name, 0.0) + weight * inner
    return weights


def _summands(one: Composition) -> Sequence[tuple[Composition, float]]:
    return one.summands if isinstance(one, Weighted) else [(one, 1.0)]
