"""The outbox keeps each event until each receiver has it."""

from pathlib import Path
from typing import Any

import pytest
from webhook_receiver import Receiver

from flows.errors import RepositoryError
from flows.runtime.git import Git
from flows.webhooks.announce import announce
from flows.webhooks.delivery import Result, deliver, signature
from flows.webhooks.events import Event, TagProof
from flows.webhooks.outbox import Outbox, outbox_path

URLS = ("https://one.example/a", "https://two.example/b")
EVENT = Event("candidate", "docs", "v0.1.0", {"version": "v0.1.0"})
PROOF = TagProof("docs@v0.1.0", "sha256:abc")


def test_an_event_waits_for_each_of_its_receivers(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "folder" / "outbox")
    outbox.add(EVENT, URLS)
    outbox.add(EVENT, URLS)
    first, second = outbox.waiting()
    assert (first.url, second.url) == URLS and first.event == second.event == EVENT.id
    outbox.note_delivered(first, 1.0)
    outbox.add(EVENT, URLS)  # once delivered, an event that is announced again is not sent again
    assert [one.url for one in Outbox(outbox.path).waiting()] == [URLS[1]]


def test_an_event_with_a_proof_waits_for_its_confirmation(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.add(EVENT, URLS, PROOF)
    outbox.add(EVENT, URLS, TagProof("docs@v0.1.0", "sha256:def"))
    assert outbox.waiting() == [] and outbox.unproven() == {EVENT.id: TagProof("docs@v0.1.0", "sha256:def")}
    outbox.confirm(EVENT.id)
    assert len(outbox.waiting()) == 2 and outbox.unproven() == {}
    outbox.add(EVENT, URLS, PROOF)  # a confirmed event stays confirmed
    assert len(outbox.waiting()) == 2
    assert outbox.discard(EVENT.id) and outbox.waiting() == [] and not outbox.discard(EVENT.id)


def test_the_time_between_attempts_doubles_up_to_an_hour(tmp_path: Path) -> None:
    outbox, now, delays = Outbox(tmp_path / "outbox"), 1000.0, []
    outbox.add(EVENT, URLS[:1])
    for _ in range(40):
        (delivery,) = outbox.waiting()
        due = outbox.note_failed(delivery, "answers 500", now)
        delays.append(due - now)
        now = due
    assert delays[:4] == [10, 20, 40, 80] and set(delays[9:]) == {3600.0}
    (delivery,) = outbox.waiting()
    assert (delivery.attempts, delivery.failing_since, delivery.error) == (40, 1000.0, "answers 500")


def test_events_without_a_failure_come_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    events = [Event("candidate", "docs", str(number), {}) for number in range(3)]
    for event in events:
        outbox.add(event, URLS[:1])
    outbox.note_failed(outbox.waiting()[0], "answers 400", 0)
    assert [one.event for one in outbox.waiting()] == [events[1].id, events[2].id, events[0].id]


def test_an_outbox_that_cannot_be_used_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "damaged").write_text("no database, but a text that is long enough to be taken for one" * 20)
    for path in (tmp_path / "file" / "outbox", tmp_path / "damaged"):
        with pytest.raises(RepositoryError, match=f"{path} cannot be used .*PEFTCORE_OUTBOX"):
            Outbox(path).add(EVENT, URLS)


def test_all_working_trees_share_one_outbox(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    Git(repository).run("worktree", "add", "--quiet", str(tree))
    assert outbox_path(tree).resolve() == outbox_path(repository).resolve()
    assert outbox_path(repository).is_relative_to(repository / ".git")
    monkeypatch.setenv("PEFTCORE_OUTBOX", str(tmp_path / "elsewhere"))
    assert outbox_path(repository) == tmp_path / "elsewhere"


def test_projects_of_one_repository_have_outboxes_of_their_own(
    two_projects: Any, receiver: Receiver, params_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail, sql = (project.root for project in two_projects)
    for name in ("mail", "sql"):
        monkeypatch.setenv(name, f"the secret of the project {name}")
    receiver.status = 500
    announce(params_of(secret="env:sql"), sql, Event("candidate", "sql", "v0.1.0", {}))
    receiver.status, before = 200, len(receiver.requests)
    assert deliver(params_of(secret="env:mail"), mail, at_once=True) == Result(0, (), ())
    assert deliver(params_of(secret="env:sql"), sql, at_once=True).sent == 1
    ((headers, body),) = receiver.requests[before:]
    identity, time = headers["webhook-id"], int(headers["webhook-timestamp"])
    assert headers["webhook-signature"] == signature(b"the secret of the project sql", identity, time, body)
