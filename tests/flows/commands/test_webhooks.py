"""`peftcore webhooks`: what waits, sending it at once, and giving it up."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import peftcore
from webhook_receiver import Receiver, receiving

from flows.webhooks import Event, announce


@pytest.fixture
def receiver(here: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver that answers 500, and one event that waits for it."""
    monkeypatch.setenv("PEFTCORE_WEBHOOK_SECRET", "a secret of twenty bytes")
    with receiving() as receiver, here.paths.params.open("a") as params:
        params.write(f"webhooks: {{endpoints: [{{url: '{receiver.url}'}}]}}\n")
        params.flush()
        receiver.status = 500
        announce(here.params, here.root, Event("promotion", "docs", "docs#champion#1", {"version": "v0.1.0"}))
        yield receiver


def test_what_waits_is_listed_and_sent_at_once(receiver: Receiver) -> None:
    listed = peftcore("webhooks", "list").stdout
    assert "promotion" in listed and "answers 500" in listed
    (waiting,) = json.loads(peftcore("webhooks", "list", "--json").stdout)
    lines = peftcore("webhooks", "list", COLUMNS="80").stdout.splitlines()
    assert lines[:3] == [
        f"{waiting['event']} (promotion)",
        f"  receiver         {receiver.url}",
        "  failed attempts  1",
    ], "`discard` takes the whole id, and an address can be copied"
    assert (waiting["type"], waiting["url"], waiting["attempts"]) == ("promotion", receiver.url, 1)
    refused = peftcore("webhooks", "send")
    assert refused.exit_code == 1 and "nothing is lost, 1 event waits in the outbox" in refused.stderr
    receiver.status = 200
    assert json.loads(peftcore("webhooks", "send", "--json").stdout) == {"sent": 1, "waiting": 0}
    assert list(receiver.accepted) == [waiting["event"]]
    assert peftcore("webhooks", "list").stdout == "no event waits\n"


def test_an_event_can_be_given_up(receiver: Receiver) -> None:
    refused = peftcore("webhooks", "discard", "evt_1")
    assert refused.exit_code == 1 and "no event evt_1 waits" in refused.stderr
    (waiting,) = json.loads(peftcore("webhooks", "list", "--json").stdout)
    assert json.loads(peftcore("webhooks", "discard", waiting["event"], "--json").stdout) == {
        "discarded": waiting["event"]
    }
    receiver.status = 200
    assert peftcore("webhooks", "send").stdout == "0 sent, 0 waiting\n" and not receiver.accepted


def test_an_event_for_a_receiver_that_was_removed_is_named(here: Any, receiver: Receiver) -> None:
    here.paths.params.write_text(here.paths.params.read_text().replace(receiver.url, "http://127.0.0.1:9/"))
    assert "never: not in params.yaml" in peftcore("webhooks", "list").stdout
    refused = peftcore("webhooks", "send")
    assert refused.exit_code == 1 and "receivers that are not in params.yaml" in refused.stderr
