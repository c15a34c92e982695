"""Errors of requests, each with its HTTP status and with the `type` and `code` of OpenAI's API."""

from typing import Any, ClassVar

from peftcore.errors import PeftError


class ServingError(PeftError, RuntimeError):
    """A request was refused or failed; other requests are not affected.

    Args:
        message: Text for the client.
        param: Field of the request that caused the error.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response, besides the usual ones."""
        return {}

    def body(self) -> dict[str, Any]:
        """Return the error object of OpenAI's API."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequestError(ServingError):
    """The request is invalid or not supported."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """Prompt and completion exceed the context length."""

    code = "context_length_exceeded"


class GrammarError(BadRequestError):
    """A grammar of the answer is invalid, not supported, or too complex."""

    code = "invalid_grammar"


class ApiKeyError(ServingError):
    """The API key is missing or wrong."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class NotAllowedError(ServingError):
    """The server does not allow this to clients."""

    status = 403
    kind = "invalid_request_error"
    code = "not_allowed"


class UnknownModelError(ServingError):
    """No base model, adapter or composition has the requested name."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class UnknownResponseError(ServingError):
    """No recorded response has the id that a rating names."""

    status = 404
    kind = "invalid_request_error"
    code = "response_not_found"


class RecordingStoppedError(ServingError):
    """A rating cannot be recorded at present."""

    status = 503
    code = "recording_stopped"


class QueueFullError(ServingError):
    """The queue of waiting requests is full.

    Args:
        message: Text for the client.
        param: Field of the request that caused the error.
        retry_after: Estimated time until the queue has moved on (whole seconds).
    """

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, param: str | None = None, retry_after: int = 1):
        super().__init__(message, param)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The time after which to try again, as `Retry-After`."""
        return {"Retry-After": str(self.retry_after)}


class AdapterFailedError(ServingError):
    """An adapter cannot be loaded, or its logits are not finite."""

    code = "adapter_failed"


class NoRoomError(ServingError):
    """The adapters in use leave no room for another one."""

    status = 503
    code = "no_room"


class ShuttingDownError(ServingError):
    """The server is shutting down and accepts no requests."""

    status = 503
    code = "shutting_down"


class TimedOutError(ServingError):
    """The time limit of the request has passed."""

    status = 504
    kind = "timeout_error"
    code = "timeout"
