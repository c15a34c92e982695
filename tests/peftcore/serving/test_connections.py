"""Requests that do not arrive completely are ended, and do not keep other clients out."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from peftcore.serving import Limits

GIVEN: dict[str, Any] = {"model": "sql", "prompt": [5, 6], "temperature": 0}


def half_sent(url: str, sent: bytes) -> socket.socket:
    connection = socket.create_connection((url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2])), 10)
    connection.sendall(sent)
    return connection


HALF = {
    "nothing": b"",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{",
}


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
def test_a_request_that_does_not_arrive_is_ended(serving: Callable[..., Any], sent: bytes) -> None:
    served = serving(http=True, limits=Limits(read_timeout=0.2))
    with half_sent(served.url, sent) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert served.client().completions.create(**GIVEN, max_tokens=2).choices[0].finish_reason


def test_an_answer_that_takes_long_is_not_ended_by_the_read_timeout(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(read_timeout=0.2))
    served.slow_down(0.05)
    with httpx.Client(timeout=30) as client:
        for _ in range(2):  # the second request comes on the same connection
            answer = client.post(f"{served.url}/v1/completions", json={**GIVEN, "max_tokens": 10})
            assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_a_request_behind_another_on_one_connection_has_to_arrive_too(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(read_timeout=0.2))
    with half_sent(served.url, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + HALF["half a body"]) as connection:
        answers = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answers.count(b"HTTP/1.1 ") == 2 and b"HTTP/1.1 408 " in answers


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
def test_half_sent_requests_keep_nobody_out(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("peftcore.serving.server.max_connections", lambda: 20)
    served = serving(http=True, limits=Limits(read_timeout=600))
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(half_sent(served.url, sent))
        assert httpx.get(f"{served.url}/health", timeout=10).status_code == 200
        assert len(served.server.server_state.connections) <= 21


def test_idle_connections_are_closed_first_and_keep_nobody_out(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcore.serving.server.max_connections", lambda: 20)
    served = serving(http=True, limits=Limits(read_timeout=600))
    with contextlib.ExitStack() as stack:
        begun = stack.enter_context(half_sent(served.url, HALF["half a head"]))
        clients = [stack.enter_context(httpx.Client(base_url=served.url)) for _ in range(40)]
        for client in clients:
            assert client.get("/health").status_code == 200
        assert len(served.server.server_state.connections) <= 21
        begun.sendall(b"content-length: 2\r\n\r\n{}")  # was not closed, though it is the oldest
        assert begun.recv(12).startswith(b"HTTP/1.1 4") and clients[-1].get("/health").status_code == 200


def test_a_connection_stays_open_for_a_further_request(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(keep_alive=40))
    assert served.server.config.timeout_keep_alive == 40 and Limits().keep_alive > 60, "longer than a proxy's"
