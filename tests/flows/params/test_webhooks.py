"""Section `webhooks`: receivers, and where their secret is."""

from pathlib import Path

import pytest
from params_texts import read, refusal

from flows.params import EVENT_TYPES


def test_a_receiver_gets_every_event_and_the_usual_secret_by_default(tmp_path: Path) -> None:
    (endpoint,) = read(tmp_path, "webhooks: {endpoints: [{url: 'https://example.org/hook?a=b'}]}").webhooks.endpoints
    assert endpoint.events == list(EVENT_TYPES) and endpoint.secret == "env:PEFTCORE_WEBHOOK_SECRET"


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("{url: example.org}", "url"),
        ("{url: 'ftp://example.org'}", "url"),
        ("{url: 'https://a b'}", "url"),
        ("{url: 'https://example.org', events: []}", "events"),
        ("{url: 'https://example.org', events: [promoted]}", "events.0"),
        ("{url: 'https://example.org', secret: 'my secret words'}", "secret"),
        ("{url: 'https://example.org', secret: 'env:'}", "secret"),
        ("{url: 'https://example.org', secret: 'env:A-B'}", "secret"),
        ("{url: 'https://example.org', secret: 'file:'}", "secret"),
    ],
)
def test_what_is_no_receiver_is_refused_by_its_key(tmp_path: Path, entry: str, key: str) -> None:
    message = refusal(tmp_path, f"webhooks: {{endpoints: [{entry}]}}")
    assert message.startswith(f"params.yaml:1: webhooks.endpoints.0.{key}: ")


def test_one_address_is_given_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "webhooks: {endpoints: [{url: 'https://a.example'}, {url: 'https://a.example'}]}")
    assert "https://a.example is given twice" in message


@pytest.mark.parametrize(
    "text", ["url: 'https://me:pass@example.org'", "secret: whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, f"webhooks: {{endpoints: [{{{text}}}]}}")
    assert "params.yaml is committed, so remove the secret" in message
    assert "pass@" not in message and "whsec_" not in message
