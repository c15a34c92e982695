"""Delivery: signed, repeated until it is accepted, and never a reason for a run to fail."""

import base64
import hashlib
import hmac
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from webhook_receiver import Receiver

from flows.errors import ParamsError
from flows.params import Params
from flows.runtime.locks import exclusive_if_free
from flows.webhooks import delivery
from flows.webhooks.announce import announce
from flows.webhooks.delivery import deliver, read_secret, shown, signature, try_to_deliver
from flows.webhooks.events import Event
from flows.webhooks.outbox import Outbox, outbox_path

SECRET = b"a secret of twenty bytes"
Make = Callable[..., Params]


def event(key: str, kind: str = "candidate") -> Event:
    return Event(kind, "docs", key, {"version": key})  # type: ignore[arg-type]


class Clock:
    """The time of the module under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_700_000_000.0
        monkeypatch.setattr(delivery, "time", self)

    def time(self) -> float:
        return self.now


def test_a_request_is_signed_by_the_standard_and_has_the_stored_json(
    repository: Path, receiver: Receiver, params_of: Make
) -> None:
    announce(params_of(), repository, event("v0.1.0"))
    ((headers, body),) = receiver.requests
    assert json.loads(body)["data"] == {"version": "v0.1.0"} and headers["content-type"] == "application/json"
    assert headers["webhook-id"] == json.loads(body)["id"] == event("v0.1.0").id
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    expected = base64.b64encode(hmac.digest(SECRET, signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert Outbox(outbox_path(repository)).waiting() == []


def test_a_library_of_the_standard_accepts_the_signature(
    repository: Path, receiver: Receiver, params_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("standardwebhooks", reason="the receivers' library is not part of the environment")
    secret = "whsec_" + base64.b64encode(hashlib.sha256(b"key").digest()).decode()
    monkeypatch.setenv("PEFTCORE_WEBHOOK_SECRET", secret)
    announce(params_of(), repository, event("v0.1.0"))
    ((headers, body),) = receiver.requests
    assert library.Webhook(secret).verify(body, headers)["type"] == "candidate"
    with pytest.raises(library.WebhookVerificationError):
        library.Webhook(secret).verify(body.replace(b"v0.1.0", b"v6.6.6"), headers)


def test_a_receiver_that_answers_500_for_a_day_gets_every_event_once_it_recovers(
    repository: Path,
    receiver: Receiver,
    params_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, params, outbox = Clock(monkeypatch), params_of(), Outbox(outbox_path(repository))
    receiver.status = 500
    for number in range(3):
        announce(params, repository, event(f"v0.{number}.0"))
    assert (
        "answers 500 Internal Server Error; nothing is lost, 1 event waits in the outbox until 2023-11-14 22:13:30"
        in (caplog.messages[0])
    )
    begin = clock.now
    while clock.now < begin + 24 * 3600:
        clock.now += 600
        try_to_deliver(params, repository)
    assert receiver.accepted == {} and len(outbox.waiting()) == 3
    assert len(receiver.requests) < 3 * 40  # an attempt an hour, not every ten minutes
    assert "answers 500 Internal Server Error since 2023-11-14 22:13:20 UTC" in caplog.messages[-1]
    assert "3 events wait" in caplog.messages[-1] and "`peftcore webhooks send` tries at once" in caplog.messages[-1]
    receiver.status, asked = 204, len(receiver.requests)
    clock.now += 3600
    try_to_deliver(params, repository)
    assert [one["data"]["version"] for one in receiver.accepted.values()] == ["v0.0.0", "v0.1.0", "v0.2.0"]
    assert len(receiver.requests) == asked + 3 and outbox.waiting() == []
    try_to_deliver(params, repository)
    assert len(receiver.requests) == asked + 3


def test_one_attempt_a_call_while_a_receiver_is_down(
    repository: Path, receiver: Receiver, params_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, params = Clock(monkeypatch), params_of()
    receiver.status = 503
    for number in range(4):
        Outbox(outbox_path(repository)).add(event(str(number)), [receiver.url])
    clock.now += 1
    try_to_deliver(params, repository)
    assert len(receiver.requests) == 1


def test_a_slow_receiver_holds_up_a_command_for_a_limited_time(
    repository: Path, receiver: Receiver, params_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, post = Clock(monkeypatch), delivery._post

    def slow(*arguments: Any) -> Any:
        clock.now += 8
        return post(*arguments)

    monkeypatch.setattr(delivery, "_post", slow)
    for number in range(10):
        Outbox(outbox_path(repository)).add(event(str(number)), [receiver.url])
    assert deliver(params_of(), repository).sent == 4, "none is begun after 30 seconds"
    assert deliver(params_of(), repository, at_once=True).sent == 6


def test_an_event_that_is_refused_for_ever_holds_up_no_other(
    repository: Path, receiver: Receiver, params_of: Make
) -> None:
    receiver.refused = {"candidate": 400}
    announce(params_of(), repository, event("v0.1.0"))
    announce(params_of(), repository, event("v0.1.0", "promotion"))
    (waiting,) = Outbox(outbox_path(repository)).waiting()
    assert [one["type"] for one in receiver.accepted.values()] == ["promotion"]
    assert (waiting.type, waiting.attempts, waiting.error) == ("candidate", 1, "answers 400 Bad Request")


@pytest.mark.parametrize("url", ["http://hooks..example/", "http://[::1/"])
def test_an_address_without_meaning_fails_no_command(
    repository: Path, receiver: Receiver, params_of: Make, url: str
) -> None:
    announce(params_of(url, receiver.url), repository, event("v0.1.0"))
    assert len(receiver.accepted) == 1
    (waiting,) = Outbox(outbox_path(repository)).waiting()
    assert waiting.url == url and "cannot be reached" in str(waiting.error)


@pytest.mark.parametrize(("variable", "value"), [("SSL_CERT_FILE", "/nowhere"), ("HTTP_PROXY", "socks4://localhost:1")])
def test_an_environment_that_httpx_cannot_use_fails_no_command(
    repository: Path, receiver: Receiver, params_of: Make, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    announce(params_of(), repository, event("v0.1.0"))
    (waiting,) = Outbox(outbox_path(repository)).waiting()
    assert "is not called" in str(waiting.error)


@pytest.mark.parametrize("status", [301, 307, 404, 410])
def test_only_a_status_of_200_to_299_is_an_acceptance(
    repository: Path, receiver: Receiver, params_of: Make, status: int
) -> None:
    receiver.status = status
    announce(params_of(), repository, event("v0.1.0"))
    assert len(receiver.requests) == 1  # a redirect is not followed
    assert len(Outbox(outbox_path(repository)).waiting()) == 1


def test_a_receiver_gets_only_its_types_of_events(repository: Path, receiver: Receiver, params_of: Make) -> None:
    announce(params_of(events=["rollback"]), repository, event("v0.1.0"))
    assert receiver.requests == [] and not outbox_path(repository).exists()


def test_a_dead_receiver_delays_no_other(
    repository: Path, receiver: Receiver, params_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    announce(params_of("http://127.0.0.1:9/?token=private", receiver.url), repository, event("v0.1.0"))
    assert list(receiver.accepted) == [event("v0.1.0").id]
    (message,) = caplog.messages
    assert "http://127.0.0.1:9/ cannot be reached" in message and "private" not in message


def test_events_to_a_former_receiver_wait_and_are_not_sent(
    repository: Path, receiver: Receiver, params_of: Make
) -> None:
    receiver.status = 500
    announce(params_of(), repository, event("v0.1.0"))
    receiver.status = 200
    result = deliver(params_of("http://127.0.0.1:9/other"), repository, at_once=True)
    assert (result.sent, len(result.waiting), len(receiver.requests)) == (0, 1, 1)
    assert deliver(params_of(), repository, at_once=True).sent == 1


def test_a_clock_that_was_set_back_holds_up_nothing(
    repository: Path, receiver: Receiver, params_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    receiver.status = 500
    announce(params_of(), repository, event("v0.1.0"))
    receiver.status, clock.now = 200, clock.now - 365 * 86400
    try_to_deliver(params_of(), repository)
    assert len(receiver.accepted) == 1


def test_while_one_process_sends_another_one_does_not(repository: Path, receiver: Receiver, params_of: Make) -> None:
    Outbox(outbox_path(repository)).add(event("v0.1.0"), [receiver.url])
    with exclusive_if_free(outbox_path(repository).with_suffix(".sending")) as is_mine:
        assert is_mine
        assert deliver(params_of(), repository).sent == 0
    assert deliver(params_of(), repository).sent == 1


def test_without_a_secret_events_wait_until_there_is_one(
    repository: Path,
    receiver: Receiver,
    params_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("PEFTCORE_WEBHOOK_SECRET")
    announce(params_of(), repository, event("v0.1.0"))
    assert receiver.requests == []
    assert "the environment variable PEFTCORE_WEBHOOK_SECRET has no secret of webhooks" in caplog.text
    (repository / "secret").write_text(SECRET.decode() + "\n")
    assert deliver(params_of(secret="file:secret"), repository, at_once=True).sent == 1


def test_a_secrets_file_is_found_where_gits_folder_is_elsewhere(
    repository: Path, receiver: Receiver, params_of: Make, tmp_path: Path
) -> None:
    # as in a submodule
    subprocess.run(["git", "init", "--quiet", "--separate-git-dir", str(tmp_path / "away")], cwd=repository, check=True)
    (repository / "secret").write_text(SECRET.decode() + "\n")
    announce(params_of(secret="file:secret"), repository, event("v0.1.0"))
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no secret of webhooks"),
        ("short", "has 5 bytes; give at least 16"),
        ("whsec_c2hvcnQ=", "has 5 bytes; give at least 16"),
        ("whsec_not base64!", "is not base64"),
    ],
)
def test_a_bad_secret_is_refused_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    monkeypatch.setenv("HOOK", text)
    (tmp_path / "hook").write_text(text)
    for source in ("env:HOOK", "file:hook"):
        with pytest.raises(ParamsError, match=problem) as raised:
            read_secret(source, tmp_path)
        assert not text or text not in str(raised.value)
    with pytest.raises(ParamsError, match="absent cannot be read"):
        read_secret("file:absent", tmp_path)


def test_a_secret_is_base64_after_its_prefix_and_bytes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", "whsec_" + base64.b64encode(SECRET).decode())
    assert read_secret("env:HOOK", tmp_path) == SECRET
    (tmp_path / "hook").write_bytes(SECRET + b"\n")
    assert read_secret("file:hook", tmp_path) == SECRET
    assert signature(SECRET, "evt_1", 5, b"{}") != signature(SECRET, "evt_1", 6, b"{}")


def test_a_shown_address_has_no_query() -> None:
    assert shown("https://hooks.example/a/b?token=c#d") == "https://hooks.example/a/b"
