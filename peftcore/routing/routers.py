"""Routers: the choice of a request's adapter by name, tag, rule, share of traffic, or similarity of its text.

A router returns a composition for `PeftModel.route`, or None if it does not decide. `FirstOf` asks several routers in
order. A request that no router decides is computed by the base model.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.composition.algebra import Spec
from peftcore.errors import RoutingError

Embed = Callable[[Sequence[str]], Tensor]
"""A function from n texts to vectors (n, d)."""


@dataclass(frozen=True)
class Request:
    """The properties of a request that routers use."""

    text: str = ""
    adapter: str | None = None
    """The adapter that the caller asks for."""
    tags: frozenset[str] = frozenset()
    """Labels, such as the tenant."""
    key: str = ""
    """The caller's identity; an A/B split gives the same adapter to the same key."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Further properties for rules."""


class Router(Protocol):
    """The interface of routers."""

    def route(self, request: Request) -> Spec:
        """Return the adapter or composition that computes the request; None if this router does not decide."""
        ...


@dataclass(frozen=True)
class ByName:
    """Routing to the adapter that the request names, if it is one of `names`."""

    names: frozenset[str]

    def __init__(self, names: Iterable[str]):
        object.__setattr__(self, "names", frozenset(names))

    def route(self, request: Request) -> Spec:
        return request.adapter if request.adapter in self.names else None


@dataclass(frozen=True)
class ByTag:
    """Routing by {tag: adapter or composition}; a request with several tags gets the first entry that matches."""

    adapters: Mapping[str, Spec]

    def route(self, request: Request) -> Spec:
        return next((spec for tag, spec in self.adapters.items() if tag in request.tags), None)


@dataclass(frozen=True)
class ByRule:
    """Routing by (condition, adapter or composition); the first condition that holds decides."""

    rules: Sequence[tuple[Callable[[Request], bool], Spec]]

    def route(self, request: Request) -> Spec:
        return next((spec for holds, spec in self.rules if holds(request)), None)


class Shares:
    """An A/B split by a hash of the request's key: the same key always gets the same adapter.

    Each adapter owns an interval of [0, 1), in the order of `weights` and as long as its share. The hash places a key
    in one of them.

    Args:
        weights: {adapter, or None for the base: weight}.
        salt: text that is hashed too; another salt gives another assignment of keys.

    Raises:
        RoutingError: a weight is negative, or all are 0.
    """

    def __init__(self, weights: Mapping[str | None, float], salt: str = ""):
        total = sum(weights.values())
        if not weights or any(weight < 0 for weight in weights.values()) or total <= 0:
            raise RoutingError(f"Shares: give weights of at least 0, and one above 0; got {dict(weights)}")
        self.salt, self.shares = salt, [(name, weight / total) for name, weight in weights.items()]

    def route(self, request: Request) -> Spec:
        digest = hashlib.sha256(f"{self.salt}\0{request.key}".encode()).digest()
        position, last = int.from_bytes(digest[:8], "big") / 2**64, self.shares[-1][0]
        for name, share in self.shares:
            if position < share:
                return "__base__" if name is None else name
            position -= share
        return "__base__" if last is None else last


class Centroids:
    """Routing to the adapter whose training texts are most similar to the request's text, by cosine of embeddings.

    Args:
        embed: function from texts to vectors.
        centroids: {adapter: vector (d,)}; `Centroids.of` computes them from texts.
        at_least: cosine below which this router does not decide.

    Raises:
        RoutingError: there is no centroid.
    """

    def __init__(self, embed: Embed, centroids: Mapping[str, Tensor], at_least: float = -1.0):
        if not centroids:
            raise RoutingError("Centroids: give at least one adapter")
        self.embed, self.names, self.at_least = embed, list(centroids), at_least
        self.centroids = F.normalize(torch.stack([centroid.float() for centroid in centroids.values()]), dim=-1)

    @classmethod
    def of(cls, embed: Embed, texts: Mapping[str, Sequence[str]], at_least: float = -1.0) -> "Centroids":
        """Compute the centroids from {adapter: its training texts}: the mean of the normalised vectors of its texts."""
        empty = [name for name, own in texts.items() if not own]
        if empty:
            raise RoutingError(f"Centroids: {empty} have no texts; give some, or leave them out")
        return cls(embed, {n: F.normalize(embed(own).float(), dim=-1).mean(0) for n, own in texts.items()}, at_least)

    def similarities(self, texts: Sequence[str]) -> Tensor:
        """Return the cosines (n, adapters) of n texts, in the order of `names`."""
        return F.normalize(self.embed(texts).float(), dim=-1) @ self.centroids.T

    def route(self, request: Request) -> Spec:
        best, index = self.similarities([request.text])[0].max(0)
        return self.names[int(index)] if float(best) >= self.at_least else None


@dataclass(frozen=True)
class FirstOf:
    """Routing by the first of several routers that decides, else to the fallback (None: the base)."""

    routers: Sequence[Router]
    fallback: Spec = None

    def route(self, request: Request) -> Spec:
        for router in self.routers:
            if (decision := router.route(request)) is not None:
                return decision
        return self.fallback
