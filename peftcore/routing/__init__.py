"""Serving many adapters from one base: `store.py` thousands on disk and some in the model, `routers.py` which of them a
request gets, `gates.py` mixtures that a function weighs token by token,
`fusion.py` those that attention is trained to weigh."""

from peftcore.routing.fusion import Fusion
from peftcore.routing.gates import arrow_gate
from peftcore.routing.routers import ByName, ByRule, ByTag, Centroids, FirstOf, Request, Router, Shares
from peftcore.routing.store import AdapterStore, Lease

__all__ = [
    "AdapterStore",
    "ByName",
    "ByRule",
    "ByTag",
    "Centroids",
    "FirstOf",
    "Fusion",
    "Lease",
    "Request",
    "Router",
    "Shares",
    "arrow_gate",
]
