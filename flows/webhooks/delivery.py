"""Delivery of the outbox's events, signed as Standard Webhooks (https://www.standardwebhooks.com).

A request has the headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. The signature is `v1,` and the
base64 of HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"). A receiver accepts an event by a status from 200 to 299. Everything
else is a failure, and the event is sent again: after 10 s, then after twice the time before, up to one hour.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import ParamsError, PipelineError
from flows.params import Endpoint, Params
from flows.runtime.git import Git, GitError
from flows.runtime.locks import exclusive, exclusive_if_free
from flows.webhooks.events import TagProof
from flows.webhooks.outbox import LONGEST_DELAY, Delivery, Outbox, outbox_path

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""Seconds of silence (to connect, to answer) after which an attempt has failed."""
MOST_SECONDS = 30.0
"""Seconds after which a call of `deliver` begins no further attempt, unless it sends everything at once."""
SHORTEST_SECRET = 16
"""Bytes."""
_PREFIX = "whsec_"


@dataclass(frozen=True)
class Failure:
    """A receiver that did not accept an event. delivery: the event, before this attempt; due: time of the next one."""

    delivery: Delivery
    reason: str
    due: float


@dataclass(frozen=True)
class Result:
    """The result of sending what is due.

    Attributes:
        sent: events that were accepted (count, one for each receiver).
        waiting: deliveries that wait, those to former receivers included.
        failures: one for each receiver that failed.
    """

    sent: int
    waiting: tuple[Delivery, ...]
    failures: tuple[Failure, ...]


def deliver(params: Params, root: Path, at_once: bool = False) -> Result:
    """Send the events that are due to the receivers of params.yaml.

    Only one process sends at a time. Another one waits if `at_once` is given, and returns otherwise. After an error of
    the network, a status of 500 or more, 408 or 429, the receiver's other events wait for the next call.

    Args:
        params: the receivers.
        root: the repository.
        at_once: also send the events whose next attempt is not due yet.

    Raises:
        RepositoryError: the outbox cannot be used.
    """
    outbox = Outbox(outbox_path(root))
    if not outbox.path.exists():
        return Result(0, (), ())
    sent, failures = 0, list[Failure]()
    until = math.inf if at_once else time.time() + MOST_SECONDS
    lock = outbox.path.with_suffix(".sending")
    with exclusive(lock) if at_once else exclusive_if_free(lock) as is_mine:
        if is_mine is not False:
            _settle(outbox, root)
            clone = Git(root).main_top()  # a working tree of a retraining has no secret
            waiting = outbox.waiting()
            for endpoint in params.webhooks.endpoints:
                deliveries = [delivery for delivery in waiting if delivery.url == endpoint.url]
                count, failure = _deliver_to(endpoint, clone, outbox, deliveries, at_once, until)
                sent += count
                failures += [] if failure is None else [failure]
    return Result(sent, tuple(outbox.waiting()), tuple(failures))


def try_to_deliver(params: Params, root: Path) -> None:
    """Send the events that are due; what fails is a warning, because the events stay in the outbox."""
    if not params.webhooks.endpoints:
        return
    try:
        result = deliver(params, root)
    except (PipelineError, OSError) as error:  # OSError: a full disk has no place for a lock
        logger.warning("webhooks: %s", error)
        return
    for failure in result.failures:
        logger.warning("%s", in_words(failure, result.waiting))


def in_words(failure: Failure, waiting: Sequence[Delivery]) -> str:
    """Return the message about a receiver that fails."""
    one = failure.delivery
    count = sum(delivery.url == one.url for delivery in waiting)
    since = "" if one.failing_since is None else f" since {_clock(one.failing_since)} ({one.attempts + 1} attempts)"
    return (
        f"the webhook {shown(one.url)} {failure.reason}{since}; nothing is lost, {count} "
        f"{'event waits' if count == 1 else 'events wait'} in the outbox until {_clock(failure.due)}. "
        "`peftcore webhooks send` tries at once, `peftcore webhooks list` shows them"
    )


def shown(url: str) -> str:
    """Return an address without its query, which may hold a token."""
    return re.split("[?#]", url)[0]


def read_secret(source: str, root: Path) -> bytes:
    """Return a signing secret.

    A text that begins with `whsec_` is base64, as in Standard Webhooks; of any other text the bytes are the secret.

    Args:
        source: env:VARIABLE or file:PATH, relative to `root`.
        root: the repository.

    Raises:
        ParamsError: the secret is absent, not base64 or too short. The message does not repeat the secret.
    """
    kind, _, name = source.partition(":")
    try:
        text = (
            os.environ.get(name, "") if kind == "env" else (root / Path(name).expanduser()).read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"the secret of webhooks in {name} cannot be read: {error}") from error
    text = text.strip()
    if not text:
        where = f"the environment variable {name}" if kind == "env" else f"the file {name}"
        raise ParamsError(f"{where} has no secret of webhooks; `openssl rand -hex 32` makes one")
    try:
        encoded = text.removeprefix(_PREFIX)
        secret = base64.b64decode(encoded, validate=True) if text.startswith(_PREFIX) else text.encode()
    except binascii.Error as error:
        raise ParamsError(
            f"the secret of webhooks in {name} begins with {_PREFIX} and is not base64: {error}"
        ) from error
    if len(secret) < SHORTEST_SECRET:
        raise ParamsError(
            f"the secret of webhooks in {name} has {len(secret)} bytes; give at least {SHORTEST_SECRET}, such as those "
            "of `openssl rand -hex 32`"
        )
    return secret


def signature(secret: bytes, event: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature` of a request. timestamp: seconds since 1970 of this attempt."""
    digest = hmac.new(secret, f"{event}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _deliver_to(
    endpoint: Endpoint, root: Path, outbox: Outbox, deliveries: Sequence[Delivery], at_once: bool, until: float
) -> tuple[int, Failure | None]:
    """Send one receiver's events until the time `until`; returns the number of accepted ones, and the last failure."""
    import httpx

    now = time.time()
    # a time too far away was computed by a clock that has been set back since
    due = [one for one in deliveries if at_once or one.due <= now or one.due > now + LONGEST_DELAY]
    if not due:
        return 0, None
    sent, failure = 0, None
    try:
        secret = read_secret(endpoint.secret, root)
        client = httpx.Client(timeout=SECONDS, follow_redirects=False)
    # variables such as SSL_CERT_FILE and ALL_PROXY can have values that httpx cannot use
    except (ParamsError, httpx.InvalidURL, ImportError, OSError, ValueError) as error:
        reason = f"is not called: {error}"
        return 0, Failure(due[0], reason, outbox.note_failed(due[0], reason, now))
    with client:
        for one in due:
            if time.time() > until:
                break
            reason, is_down = _post(client, one, secret)
            if reason is None:
                outbox.note_delivered(one, time.time())
                sent += 1
                continue
            failure = Failure(one, reason, outbox.note_failed(one, reason, time.time()))
            if is_down:
                break
    return sent, failure


def _post(client: "httpx.Client", delivery: Delivery, secret: bytes) -> tuple[str | None, bool]:
    """Make one attempt; returns the reason of a failure, and whether the receiver's other events would fail too."""
    import httpx

    body, timestamp = delivery.body.encode(), int(time.time())
    headers = {
        "content-type": "application/json",
        "user-agent": "peftcore",
        "webhook-id": delivery.event,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, delivery.event, timestamp, body),
    }
    try:
        with client.stream("POST", delivery.url, content=body, headers=headers) as response:  # the answer is not read
            status, words = response.status_code, response.reason_phrase
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:  # ValueError: host names without meaning
        return f"cannot be reached ({str(error) or type(error).__name__})", True
    if 200 <= status < 300:
        return None, False
    return f"answers {status} {words}".rstrip(), status >= 500 or status in (408, 429)


def _settle(outbox: Outbox, root: Path) -> None:
    """Confirm or remove the events of killed processes, by their tags; skipped while a process is about to tag."""
    if not outbox.unproven():
        return
    with exclusive_if_free(outbox.lock) as is_mine:
        if not is_mine:
            return
        git = Git(root)
        for event, proof in outbox.unproven().items():
            has_happened = _is_proven(git, proof)
            if has_happened is None:
                logger.warning("the webhook of the tag %s waits until %s has the tag", proof.tag, proof.remote)
            elif has_happened:
                outbox.confirm(event)
            else:
                outbox.discard(event)


def _is_proven(git: Git, proof: TagProof) -> bool | None:
    """Return True if the tag exists; None if that is not decided yet, because its push has not ended."""
    tags = git.tags(proof.tag)
    is_here = any(proof.text in tag.message for tag in tags)
    if proof.remote is None or (tags and not is_here):  # another writer's tag
        return is_here
    try:
        at_remote = git.remote_objects(proof.remote, [proof.tag])
    except GitError:
        return None
    if not is_here:
        # the remote may have accepted a tag that was deleted here because its answer was lost; a fetch decides
        return None if proof.tag in at_remote else False
    return True if at_remote.get(proof.tag) == git.objects("refs/tags/").get(proof.tag) else None


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
