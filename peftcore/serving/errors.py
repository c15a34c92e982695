"""What a request can come to: each with its HTTP status and OpenAI's `type` and `code`, which clients look at."""

from typing import Any, ClassVar

from peftcore.errors import PeftError


class ServingError(PeftError, RuntimeError):
    """A request that is refused or has failed; it is the only one. param: the field of the request that is meant."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequestError(ServingError):
    """A request that no server of this kind can answer as it stands."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """Prompt and answer are longer than the model reads."""

    code = "context_length_exceeded"


class ApiKeyError(ServingError):
    """No key, or one that is not among the server's."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class UnknownModelError(ServingError):
    """A model that is neither the base nor an adapter nor a composition here."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class QueueFullError(ServingError):
    """As many requests wait as may."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class AdapterFailedError(ServingError):
    """An adapter that cannot be loaded, or computes nothing finite."""

    code = "adapter_failed"


class NoRoomError(ServingError):
    """Adapters in use fill the model."""

    status = 503
    code = "no_room"


class ShuttingDownError(ServingError):
    """The server ends and takes nothing new."""

    status = 503
    code = "shutting_down"


class TimedOutError(ServingError):
    """Not answered within the server's limit."""

    status = 504
    kind = "timeout_error"
    code = "timeout"
