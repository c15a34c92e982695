"""Webhooks: signed JSON events for candidates, refusals, promotions, rollbacks, drift and failures.

An event is stored in the outbox, an SQLite file in git's folder, before it is sent. What is stored is sent until the
receiver accepts it. An event has the same id in every attempt.
"""

from flows.webhooks.announce import announce, announced, try_to_announce
from flows.webhooks.delivery import try_to_deliver
from flows.webhooks.events import Event, TagProof

__all__ = ["Event", "TagProof", "announce", "announced", "try_to_announce", "try_to_deliver"]
