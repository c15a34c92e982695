"""Commands of webhooks: the events in the outbox that no receiver has accepted yet."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from flows.commands.common import AsJson, errors, project
from flows.errors import RepositoryError
from flows.runtime.stage import fail


def list_waiting(as_json: AsJson = False) -> None:
    """List the events that wait for a receiver, with the reason of the last failure."""
    with errors(), project() as (params, paths):
        from flows.webhooks.delivery import shown
        from flows.webhooks.outbox import Outbox, outbox_path

        path = outbox_path(paths.root)
        waiting = Outbox(path).waiting() if path.exists() else []
        if as_json:
            print(json.dumps([asdict(delivery) for delivery in waiting], indent=2))
            return
        known = {endpoint.url for endpoint in params.webhooks.endpoints}
        for one in waiting:  # no table: an id alone has half the width of a terminal
            due = "now" if not one.due else f"{datetime.fromtimestamp(one.due, UTC):%Y-%m-%d %H:%M:%S} UTC"
            due = due if one.url in known else "never: not in params.yaml"
            print(f"{one.event} ({one.type})")
            print(f"  receiver         {shown(one.url)}")
            print(f"  failed attempts  {one.attempts}")
            print(f"  next attempt     {due}")
            if one.error:
                print(f"  last failure     {one.error}")
        if not waiting:
            print("no event waits")


def send(as_json: AsJson = False) -> None:
    """Send all events that wait, also those whose next attempt is not due yet. Exit code 1: some still wait.

    `peftcore schedule` sends due events by itself; without it, call this command from cron.
    """
    with errors(), project() as (params, paths):
        from flows.webhooks.delivery import deliver, in_words

        result = deliver(params, paths.root, at_once=True)
        left = len(result.waiting)
        print(json.dumps({"sent": result.sent, "waiting": left}) if as_json else f"{result.sent} sent, {left} waiting")
        if result.failures:
            fail("\n".join(in_words(failure, result.waiting) for failure in result.failures))
        if left:
            fail("the other events are for receivers that are not in params.yaml; see `peftcore webhooks list`")


def discard(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="Id of the event, from `peftcore webhooks list`.")],
    as_json: AsJson = False,
) -> None:
    """Remove an event from the outbox: no receiver gets it any more."""
    with errors(), project() as (_, paths):
        from flows.webhooks.outbox import Outbox, outbox_path

        path = outbox_path(paths.root)
        waiting = {delivery.event for delivery in Outbox(path).waiting()} if path.exists() else set[str]()
        if event not in waiting:
            raise RepositoryError(f"no event {event} waits; `peftcore webhooks list` shows those that do")
        Outbox(path).discard(event)
        print(json.dumps({"discarded": event}) if as_json else f"{event} is not sent any more")
