"""The server as a process would see it: it ends in order, and loses nothing under load."""

import gc
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from peftcore.errors import ConfigError
from peftcore.serving import Limits, serve, server

GIVEN: dict[str, Any] = {"model": "sql", "prompt": [5, 6], "temperature": 0}


def test_told_to_end_it_ends_what_runs_and_takes_nothing_new(serving: Callable[..., Any]) -> None:
    served = serving(http=True)
    served.slow_down(0.02)
    client = served.client()
    assert httpx.get(f"{served.url}/ready").status_code == 200
    parts = client.completions.create(**GIVEN, max_tokens=40, stream=True)
    assert next(parts)
    served.server.handle_exit(15, None)
    with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
        client.completions.create(**GIVEN)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert httpx.get(f"{served.url}/ready").status_code == 503
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    served.wait(lambda: not served.service.engine.alive)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


def test_a_port_of_its_own_monitors_without_the_key_and_does_nothing_else(serving: Callable[..., Any]) -> None:
    served = serving(http=True, keys=["first"], metrics_port=0)
    monitoring = served.server.metrics_address
    assert monitoring != served.url
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{monitoring}{path}").status_code == 200
        assert httpx.get(f"{served.url}{path}").status_code == 401
    assert "peftcore_requests_total" in httpx.get(f"{monitoring}/metrics").text
    for path in ("/v1/models", "/v1/load_lora_adapter", "/docs", "/openapi.json"):
        assert httpx.get(f"{monitoring}{path}").status_code == 404
    served.server.handle_exit(15, None)
    served.wait(lambda: not served.service.engine.alive)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{monitoring}/health")


def test_the_garbage_collector_leaves_model_and_libraries_alone(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(server.Server, "run", lambda *_: seen.append(len(gc.get_objects())))
    try:
        serve(serving().service, port=0)
    finally:
        gc.unfreeze()
    assert seen[0] < 1000 < len(gc.get_objects())


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_that_is_in_use_is_named_by_its_option(serving: Callable[..., Any], option: str) -> None:
    served = serving()
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        ports = (port, None) if option == "--port" else (0, port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}.* or {option}$"):
            serve(served.service, "127.0.0.1", *ports)


@pytest.mark.parametrize("again", [False, True])
def test_what_runs_too_long_then_or_at_a_second_signal_fails(serving: Callable[..., Any], again: bool) -> None:
    served = serving(http=True, limits=Limits(grace=60 if again else 0.3))
    served.slow_down(0.02)
    parts = served.client().completions.create(**GIVEN, max_tokens=500, stream=True)
    assert next(parts)
    served.server.handle_exit(15, None)
    if again:
        served.server.handle_exit(15, None)
    with pytest.raises(openai.APIError, match="was shut down before the request was complete"):
        list(parts)
    served.wait(lambda: not served.service.engine.alive, 5)


@pytest.mark.slow
def test_of_a_thousand_requests_none_is_lost(serving: Callable[..., Any], world: Any) -> None:
    """Of 40 clients with 6 models, some of which leave in the middle; the store holds 3 adapters."""
    served = serving(http=True, max_loaded=3, limits=Limits(max_batch=16))
    client, names = served.client(), ("base", "sql", "chat", "dora", "ia3", "mix")
    prompts = [[5 + number, 9] for number in range(10)]
    expected = {(name, number): world.expected(name, p, 8) for name in names for number, p in enumerate(prompts)}
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(turn: int) -> None:
        name, number = names[turn % 6], turn % 10
        given: Any = {"model": name, "prompt": prompts[number], "temperature": 0, "max_tokens": 8}
        if turn % 50 == 7:
            with client.completions.create(**given, stream=True) as parts:
                next(iter(parts))
            outcome = "left"
        elif turn % 2:
            parts = client.completions.create(**given, stream=True)
            text = "".join(part.choices[0].text for part in parts)
            outcome = "right" if text == expected[name, number] else "wrong"
        else:
            text = client.completions.create(**given).choices[0].text
            outcome = "right" if text == expected[name, number] else "wrong"
        with lock:
            outcomes[outcome] += 1

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(1000)))
    assert outcomes == {"right": 980, "left": 20}
    served.wait(lambda: served.service.engine.idle)
    assert served.service.catalog.store.statistics()["in_use"] == 0
    labels = [{"model": name, "status": status} for name in names for status in ("200", "499")]
    served.wait(lambda: sum(served.metric("peftcore_requests_total", **one) for one in labels) == 1000)
