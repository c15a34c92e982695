"""Serving many adapters from one base model.

`store.py` keeps thousands of adapters on disk and the used ones in the model. `routers.py` chooses the adapter of a
request. `gates.py` mixes adapters token by token without training (Arrow), `fusion.py` by trained attention
(AdapterFusion).
"""

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
