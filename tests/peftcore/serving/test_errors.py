"""Errors of requests have the status, type and code of OpenAI's API, so that OpenAI's client knows them."""

from typing import Any

import httpx
import openai
import pytest

from peftcore.errors import PeftError
from peftcore.serving import errors
from peftcore.serving.errors import ServingError

KINDS: list[tuple[type[ServingError], type[openai.APIStatusError], str, str | None]] = [
    (errors.BadRequestError, openai.BadRequestError, "invalid_request_error", None),
    (errors.ContextLengthError, openai.BadRequestError, "invalid_request_error", "context_length_exceeded"),
    (errors.GrammarError, openai.BadRequestError, "invalid_request_error", "invalid_grammar"),
    (errors.UnknownResponseError, openai.NotFoundError, "invalid_request_error", "response_not_found"),
    (errors.RecordingStoppedError, openai.InternalServerError, "server_error", "recording_stopped"),
    (errors.ApiKeyError, openai.AuthenticationError, "authentication_error", "invalid_api_key"),
    (errors.NotAllowedError, openai.PermissionDeniedError, "invalid_request_error", "not_allowed"),
    (errors.UnknownModelError, openai.NotFoundError, "invalid_request_error", "model_not_found"),
    (errors.QueueFullError, openai.RateLimitError, "rate_limit_error", "queue_full"),
    (errors.AdapterFailedError, openai.InternalServerError, "server_error", "adapter_failed"),
    (errors.NoRoomError, openai.InternalServerError, "server_error", "no_room"),
    (errors.ShuttingDownError, openai.InternalServerError, "server_error", "shutting_down"),
    (errors.TimedOutError, openai.InternalServerError, "timeout_error", "timeout"),
]


def caught_by_openai(error: ServingError) -> openai.APIStatusError:
    """The error that OpenAI's client raises for a response with this status and body."""
    transport = httpx.MockTransport(lambda _: httpx.Response(error.status, json=error.body()))
    with httpx.Client(transport=transport) as http:
        client = openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=http, max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            client.models.list()
    return caught.value


@pytest.mark.parametrize(("kind", "theirs", "type_name", "code"), KINDS, ids=lambda one: getattr(one, "__name__", ""))
def test_openais_client_knows_each_error(
    kind: type[ServingError], theirs: type[openai.APIStatusError], type_name: str, code: str | None
) -> None:
    caught = caught_by_openai(kind("this went wrong", "model"))
    assert type(caught) is theirs
    assert (caught.type, caught.code, caught.param) == (type_name, code, "model")
    assert "this went wrong" in str(caught)


def test_every_kind_of_error_is_in_the_table() -> None:
    def subclasses(kind: type[Any]) -> set[type[Any]]:
        return {kind, *(inner for child in kind.__subclasses__() for inner in subclasses(child))}

    assert subclasses(ServingError) - {ServingError} == {kind for kind, *_ in KINDS}


def test_only_errors_that_pass_by_waiting_are_503_429_or_504() -> None:
    """Clients and load balancers try again after these, and not after others."""
    again = {kind for kind, *_ in KINDS if kind.status in (429, 503, 504)}
    assert again == {
        errors.QueueFullError,
        errors.NoRoomError,
        errors.ShuttingDownError,
        errors.TimedOutError,
        errors.RecordingStoppedError,  # until somebody makes room
    }


def test_a_serving_error_is_an_error_of_the_package_and_names_no_field_by_default() -> None:
    error = ServingError("text")
    assert isinstance(error, PeftError) and isinstance(error, RuntimeError) and error.status == 500
    assert error.body() == {"error": {"message": "text", "type": "server_error", "param": None, "code": None}}
