"""What adapters can be composed to. A composition turns a layer f into another; f is the base, or what acts below.

    Only(a)          a on top of f: after_a(x, f(before_a(x)))
    Stack(a, b)      b on top of a on top of f, as `set_adapter([a, b])`
    Weighted         f(x) + Σ wᵢ (cᵢ(x) − f(x)), weights of any sign; for LoRA exactly the weighted sum of the ΔW
    Parallel(a, b)   Weighted with every weight 1: each sees f and not the other
    Average(a, b)    Weighted with every weight 1/n
    Split            by position in the text: the first n tokens by one, the next by another
    Gate             Weighted whose weights a function gives for each token at each layer

They nest, and compare and hash by what they hold. For pairs of them `0.7 * Only("sql") - 0.2 * Only("toxic")` does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, NamedTuple, Union

from torch import Tensor

from peftcore.errors import RoutingError

BASE_NAME = "__base__"
"""PEFT's name for the base model, which None stands for too."""
Spec = Union["Composition", str, None, Mapping[Any, float]]
"""What may be given for a composition: one, an adapter's name, None for the base, or weights by name."""
Gating = Callable[[str, Mapping[str, Any], Tensor], Tensor]
"""(path of a layer, {name: its adapter there}, x (..., i)) -> weights (..., k), in the order of the names."""


class Composition(ABC):
    """One of the forms above; immutable."""

    def names(self) -> Iterator[str]:
        """Adapters in it, in order; one that is in it twice comes twice."""
        for child in self.children():
            yield from child.names()

    def children(self) -> Sequence["Composition"]:
        """What it is made of."""
        return ()

    def chain(self) -> tuple[str, ...] | None:
        """The adapters that act one on top of another, where that is all it says; else None."""
        return None

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> "Composition":
        """The same of adapters by other names: {name here: name there}; others keep theirs."""

    @abstractmethod
    def terms(self) -> Iterator["Term"]:
        """Σ over adapters of weight x ΔW x, which it is where every one of them only adds ΔW x to the output."""

    def __add__(self, other: "Composition") -> "Weighted":
        return Weighted([*_summands(self), *_summands(other)])

    def __sub__(self, other: "Composition") -> "Weighted":
        return self + -1.0 * other

    def __mul__(self, factor: float) -> "Weighted":
        return Weighted([(child, factor * weight) for child, weight in _summands(self)])

    __rmul__ = __mul__


class Term(NamedTuple):
    """weight x ΔW x of one adapter, at tokens from `start` to before `stop` of the text, times what gates say."""

    name: str
    weight: float
    start: float = 0
    stop: float = math.inf
    gates: tuple[tuple["Gate", int], ...] = ()


@dataclass(frozen=True)
class Only(Composition):
    """One adapter, by its name."""

    name: str

    def names(self) -> Iterator[str]:
        yield self.name

    def chain(self) -> tuple[str, ...]:
        return (self.name,)

    def renamed(self, names: Mapping[str, str]) -> Composition:
        return Only(names.get(self.name, self.name))

    def terms(self) -> Iterator[Term]:
        yield Term(self.name, 1.0)


class Stack(Composition):
    """Each on top of the one before; without any, the base."""

    def __init__(self, *children: Spec):
        self._parts = tuple(composition(child) for child in children)

    def children(self) -> Sequence[Composition]:
        return self._parts

    def chain(self) -> tuple[str, ...] | None:
        chains = [child.chain() for child in self._parts]
        found = [name for chain in chains for name in chain or ()]
        return None if None in chains or len(set(found)) < len(found) else tuple(found)

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
    """f(x) + Σ wᵢ (cᵢ(x) − f(x)); given as {name or composition: weight}, or as pairs."""

    def __init__(self, weights: Mapping[Any, float] | Sequence[tuple[Any, float]]):
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        self.summands = tuple((composition(child), float(weight)) for child, weight in pairs)
        for child, weight in self.summands:
            if not math.isfinite(weight):
                raise RoutingError(f"the weight of {child!r} is {weight}; give a finite number")

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
    """All side by side: each sees what is below and not the others, and their changes are added."""
    return Weighted([(child, 1.0) for child in children])


def Average(*children: Spec) -> Weighted:
    """The mean of what each gives alone."""
    if not children:
        raise RoutingError("Average: give at least one adapter")
    return Weighted([(child, 1.0 / len(children)) for child in children])


class Split(Composition):
    """By position: `Split(sql=64, chat=...)` or `Split(("sql", 64), ("chat", ...))`.

    Each takes its number of tokens (count) of every row's text, from the first one that is no padding; `...` takes
    the rest. Positions that nobody takes are the base's. A decoded token counts on from the text before it.
    """

    def __init__(self, *parts: tuple[Spec, int | EllipsisType], **named: int | EllipsisType):
        given = [*parts, *named.items()]
        self.segments: tuple[tuple[Composition, float, float], ...] = ()
        """(composition, first position, position after the last)"""
        start = 0.0
        for child, length in given:
            if not isinstance(length, EllipsisType) and (isinstance(length, bool) or length < 1):
                raise RoutingError(f"Split: {child!r} gets {length!r} tokens; give at least 1, or ... for the rest")
            stop = math.inf if isinstance(length, EllipsisType) else start + length
            if start == math.inf:
                raise RoutingError(f"Split: {child!r} comes after `...`, which took the rest; put `...` last")
            self.segments += ((composition(child), start, stop),)
            start = stop

    def children(self) -> Sequence[Composition]:
        return [child for child, _, _ in self.segments]

    def renamed(self, names: Mapping[str, str]) -> Composition:
        same = Split()
        same.segments = tuple((child.renamed(names), start, stop) for child, start, stop in self.segments)
        return same

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
    """f(x) + Σ gᵢ(x) (cᵢ(x) − f(x)): weights for each token at each layer, from a function of what the layer reads.

    members: adapters by name. top_k: only so many (count) of the largest weights stay, and are made to sum to what
    all summed to; None: all stay.
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
        """(*tokens, k): of every member, 0 for those that the layer at `path` has not; x (*tokens, i), or its ids."""
        present = [name for name in self.members if name in adapters]
        given = self.gating(path, {name: adapters[name] for name in present}, x)
        if given.shape != (*tokens, len(present)):
            raise RoutingError(
                f"the gate gave weights {tuple(given.shape)} at {path} for x {tuple(x.shape)} and {len(present)} "
                f"adapters; give {(*tokens, len(present))}"
            )
        if self.top_k is not None and self.top_k < len(present):
            kept, places = given.topk(self.top_k, dim=-1)
            total = given.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
            given = given.new_zeros(given.shape).scatter(-1, places, kept * total)
        whole = given.new_zeros(*given.shape[:-1], len(self.members))
        whole[..., [self.members.index(name) for name in present]] = given
        return whole


BASE = Stack()
"""The base model alone."""


def composition(given: Spec) -> Composition:
    """A composition from what may be given for one; RoutingError for anything else."""
    if isinstance(given, Composition):
        return given
    if given is None or given == BASE_NAME:
        return BASE
    if isinstance(given, str):
        return Only(given)
    if isinstance(given, Mapping):
        return Weighted(given)
    raise RoutingError(
        f"{given!r} is no composition of adapters; give a name, None for the base, {{name: weight}}, or "
        "Stack, Weighted, Parallel, Average, Split or Gate"
    )


def weights_of(one: Composition) -> dict[str, float]:
    """{adapter: weight} of a weighted sum, however nested; RoutingError where it says more than that."""
    if isinstance(one, Only):
        return {one.name: 1.0}
    if not isinstance(one, Weighted):
        raise RoutingError(f"{one!r} is no weighted sum, which alone can be merged into one adapter; use it in a route")
    found: dict[str, float] = {}
    for child, weight in one.summands:
        for name, own in weights_of(child).items():
            found[name] = found.get(name, 0.0) + weight * own
    return found


def _summands(one: Composition) -> Sequence[tuple[Composition, float]]:
    return one.summands if isinstance(one, Weighted) else [(one, 1.0)]
