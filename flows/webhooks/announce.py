"""Announcements of events: into the outbox first, then to the receivers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import RepositoryError
from flows.params import Params
from flows.runtime.locks import shared
from flows.webhooks.delivery import try_to_deliver
from flows.webhooks.events import Event, TagProof
from flows.webhooks.outbox import Outbox, outbox_path

logger = logging.getLogger(__name__)


@contextmanager
def announced(params: Params, root: Path, event: Event, proof: TagProof) -> Iterator[None]:
    """Announce an event whose git tag is created inside of this context.

    The event is stored before the tag is created, and released after. If the process is killed in between, the next
    delivery looks for the tag: it sends the event if the tag is there, and removes the event if it is not. So every
    tag is announced, and nothing else is.

    Args:
        params: the receivers.
        root: the repository.
        event: the event.
        proof: the tag.

    Raises:
        RepositoryError: the outbox cannot be written. Nothing has happened then.
    """
    urls = _receivers(params, event)
    if not urls:
        yield
        return
    outbox = Outbox(outbox_path(root))
    outbox.check()
    with shared(outbox.lock):
        outbox.add(event, urls, proof)
        yield
        try:
            outbox.confirm(event.id)
        except RepositoryError as error:  # the tag is there, so the next delivery confirms the event
            logger.warning("%s; the webhook follows later", error)
    try_to_deliver(params, root)


def announce(params: Params, root: Path, event: Event) -> None:
    """Announce an event without a tag. Raises RepositoryError if the outbox cannot be written."""
    urls = _receivers(params, event)
    if urls:
        Outbox(outbox_path(root)).add(event, urls)
        try_to_deliver(params, root)


def try_to_announce(params: Params, root: Path, event: Event) -> None:
    """Announce an event that must not hide another error: an outbox that cannot be written is a warning."""
    try:
        announce(params, root, event)
    except RepositoryError as error:
        logger.warning("%s was not announced: %s", event.type, error)


def _receivers(params: Params, event: Event) -> list[str]:
    return [endpoint.url for endpoint in params.webhooks.endpoints if event.type in endpoint.events]
