"""Which adapter a request gets: by name, tag, rule, shares of traffic, or what its text resembles.

A router looks at a request and gives what `PeftModel.route` takes, or None where it has no opinion. `FirstOf` asks one
after another; what nobody decides is the base's.
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
"""Texts -> vectors (n, d)."""


@dataclass(frozen=True)
class Request:
    """What routers look at."""

    text: str = ""
    adapter: str | None = None
    """The name that the caller asks for."""
    tags: frozenset[str] = frozenset()
    """Such as the tenant."""
    key: str = ""
    """Who asks; the same key always gets the same share of an A/B split."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Anything else that a rule looks at."""


class Router(Protocol):
    """Anything that can be asked."""

    def route(self, request: Request) -> Spec:
        """What computes the request; None for no opinion."""
        ...


@dataclass(frozen=True)
class ByName:
    """The adapter that the request names, if it is one of these."""

    names: frozenset[str]

    def __init__(self, names: Iterable[str]):
        object.__setattr__(self, "names", frozenset(names))

    def route(self, request: Request) -> Spec:
        return request.adapter if request.adapter in self.names else None


@dataclass(frozen=True)
class ByTag:
    """{tag: what its requests get}; of several tags, the first in this order."""

    adapters: Mapping[str, Spec]

    def route(self, request: Request) -> Spec:
        return next((spec for tag, spec in self.adapters.items() if tag in request.tags), None)


@dataclass(frozen=True)
class ByRule:
    """(condition, what fits it), the first that holds."""

    rules: Sequence[tuple[Callable[[Request], bool], Spec]]

    def route(self, request: Request) -> Spec:
        return next((spec for holds, spec in self.rules if holds(request)), None)


class Shares:
    """An A/B split: {adapter: weight}. A key's share is a hash of it, so it stays; another salt deals anew.

    Growing one weight moves keys to that adapter alone: its share of the line from 0 to 1 is widened, as far as the
    others' order allows.
    """

    def __init__(self, weights: Mapping[str | None, float], salt: str = ""):
        total = sum(weights.values())
        if not weights or any(weight < 0 for weight in weights.values()) or total <= 0:
            raise RoutingError(f"Shares: give weights of at least 0, and one above; got {dict(weights)}")
        self.salt, self.shares = salt, [(name, weight / total) for name, weight in weights.items()]

    def route(self, request: Request) -> Spec:
        digest = hashlib.sha256(f"{self.salt}\0{request.key}".encode()).digest()
        place, last = int.from_bytes(digest[:8], "big") / 2**64, self.shares[-1][0]
        for name, share in self.shares:
            if place < share:
                return "__base__" if name is None else name
            place -= share
        return "__base__" if last is None else last


class Centroids:
    """The adapter whose training texts a request's text resembles most, by the cosine of their embeddings.

    at_least: cosine below which there is no opinion. centroids: {adapter: (d,)}, or make them from texts by `of`.
    """

    def __init__(self, embed: Embed, centroids: Mapping[str, Tensor], at_least: float = -1.0):
        if not centroids:
            raise RoutingError("Centroids: give at least one adapter")
        self.embed, self.names, self.at_least = embed, list(centroids), at_least
        self.centroids = F.normalize(torch.stack([centroid.float() for centroid in centroids.values()]), dim=-1)

    @classmethod
    def of(cls, embed: Embed, texts: Mapping[str, Sequence[str]], at_least: float = -1.0) -> "Centroids":
        """From {adapter: texts it was trained on}: the mean of their directions."""
        empty = [name for name, own in texts.items() if not own]
        if empty:
            raise RoutingError(f"Centroids: {empty} have no texts; give some, or leave them out")
        return cls(embed, {n: F.normalize(embed(own).float(), dim=-1).mean(0) for n, own in texts.items()}, at_least)

    def similarities(self, texts: Sequence[str]) -> Tensor:
        """Cosines (n, adapters), in the order of `names`."""
        return F.normalize(self.embed(texts).float(), dim=-1) @ self.centroids.T

    def route(self, request: Request) -> Spec:
        best, number = self.similarities([request.text])[0].max(0)
        return self.names[int(number)] if float(best) >= self.at_least else None


@dataclass(frozen=True)
class FirstOf:
    """The first opinion of several routers, else the fallback (None: the base)."""

    routers: Sequence[Router]
    fallback: Spec = None

    def route(self, request: Request) -> Spec:
        for router in self.routers:
            if (found := router.route(request)) is not None:
                return found
        return self.fallback
