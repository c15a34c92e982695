"""The middleware checks API keys and the body's size, and frees the row of a client that disconnects."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from peftcore import ConfigError
from peftcore.serving import Limits


def test_a_body_without_end_is_cut_off(serving: Callable[..., Any]) -> None:
    served = serving(http=True, limits=Limits(max_body=10_000))
    body = json.dumps({"model": "sql", "prompt": "x" * 20_000})
    for content in (body, iter([body[:6000].encode(), body[6000:].encode()])):
        reply = httpx.post(
            f"{served.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 413
        assert "more than 10,000 bytes" in reply.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_row(served: Any) -> None:
    served.slow_down(0.02)  # ten seconds for all tokens
    given = {"model": "sql", "prompt": [5, 6], "max_tokens": 500, "temperature": 0}
    beside = ThreadPoolExecutor(1).submit(
        served.client().completions.create, model="chat", prompt=[5, 6], max_tokens=60, temperature=0
    )
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**given, "stream": True}) as reply:
        next(reply.iter_bytes())
    assert beside.result().usage.completion_tokens == 60
    served.wait(lambda: served.service.engine.idle)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=given, timeout=1.0)
    served.wait(lambda: served.service.engine.idle, 5)
    assert served.service.catalog.store.statistics()["in_use"] == 0
    served.wait(lambda: served.metric("peftcore_requests_total", model="sql", status="499") == 2)


def test_without_a_key_nothing_is_answered(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["first", "sécond"])
    for key in ("k", "firs", "first2"):
        with pytest.raises(openai.AuthenticationError, match="incorrect or missing API key"):
            served.client(api_key=key).models.list()
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert served.client(api_key="first").models.list()
    header = {"authorization": "Bearer sécond".encode()}
    assert httpx.get(f"{served.url}/v1/models", headers=header).status_code == 200
    for path in ("docs", "redoc", "openapi.json"):
        assert httpx.get(f"{served.url}/{path}", headers=header).status_code == 404


def test_every_path_needs_the_key(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["first"])
    paths = {route.path for route in served.server.config.app.routes}
    assert {"/health", "/ready", "/metrics", "/v1/chat/completions", "/v1/load_lora_adapter"} <= paths
    for path in (*paths, "/", "/not/there", "//v1/models", "/v1"):
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            for headers in ({}, {"authorization": "Bearer firs"}, {"authorization": "Basic first"}):
                assert httpx.request(method, f"{served.url}{path}", headers=headers).status_code == 401, (method, path)
    key = {"authorization": "Bearer first"}
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{served.url}{path}", headers=key).status_code == 200
    assert "peftcore_" not in httpx.get(f"{served.url}/metrics").text


def test_keys_are_compared_in_constant_time_and_each_of_them(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, compared = serving(http=True, keys=["first", "a much longer second key"]), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("peftcore.serving.middleware.hmac.compare_digest", compare)
    for sent in ("first", "a much longer second key", "x"):
        httpx.get(f"{served.url}/health", headers={"authorization": f"Bearer {sent}"})
    assert compared == [(32, 32)] * 6


@pytest.mark.parametrize("keys", [[""], ["  "], ["one", ""]])
def test_an_empty_key_is_refused(serving: Callable[..., Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError, match="an API key is empty; check that its environment variable is set"):
        serving(keys=keys)


def test_white_space_around_a_key_is_no_part_of_it(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["one", " two"])
    for key in ("one", "two"):
        assert served.client(api_key=key).models.list()
