"""What a client can send to the server beyond requests: headers, bodies and names without end."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore.routing import AdapterStore
from peftcore.serving import Limits, make_service
from peftcore.serving.app import make_app
from peftcore.serving.server import Server


@pytest.fixture
def service(tokenizer: Any) -> Any:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=len(tokenizer))  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return make_service(model, tokenizer, AdapterStore(model), "base", limits=Limits(max_body=100_000))


@pytest.fixture
def client(service: Any) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as one:
        yield one


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 50_000, 400),
        (b'{"model": "base", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
        (b'{"model": "base", "max_tokens": ' + b"9" * 50_000 + b"}", 400),
        (b'{"model": "\\ud800", "prompt": "a"}', 404),
        (b'{"model": "base", "prompt": "a", "n": NaN}', 400),
        (b"x" * 100_001, 413),
    ],
    ids=["lists", "nested prompt", "digits", "half a character", "NaN", "too large"],
)
def test_a_hostile_body_is_the_clients_error(body: bytes, status: int, client: TestClient) -> None:
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and len(answer.content) < 2000


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "base/../../x", "a" * 5000, "a\nb", "a\x1b[2J"])
def test_a_model_is_looked_up_by_name_and_never_as_a_path(name: str, client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": name, "prompt": "a"})
    assert answer.status_code == 404


def test_headers_without_end_close_the_connection(service: Any) -> None:
    server = Server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.05)
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            sent = 0
            with pytest.raises(OSError):  # the server has closed it
                while sent < 64 << 20:
                    connection.sendall(b"X-A: " + b"a" * 10_000 + b"\r\n")
                    sent += 10_000
            assert sent < 8 << 20  # what the system holds of a closed connection, and no more
    finally:
        server.should_exit = True
        thread.join()
