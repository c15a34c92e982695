"""How much a server takes on at a time."""

from dataclasses import dataclass, fields

from peftcore.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError for a limit that nothing could keep."""

    max_batch: int = 16
    """Rows that are decoded together (count)."""
    max_queue: int = 256
    """Requests that wait for a row (count); one more is refused."""
    max_tokens: int = 1024
    """Tokens that one request may ask for (count)."""
    max_context: int | None = None
    """Prompt and answer together (tokens); None: what the model was made for."""
    prefill_tokens: int = 256
    """Tokens of prompts read in one forward (padding counted). A longer prompt is read in several, and running rows
    decode a token between two of them."""
    max_body: int = 4 << 20
    """Size of a request (bytes)."""
    read_timeout: float = 20.0
    """From a connection's start to the last byte of its request (seconds)."""
    timeout: float = 300.0
    """From a request's arrival to its last token (seconds)."""
    grace: float = 30.0
    """What running requests get to end in when the server is told to (seconds)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ConfigError(f"Limits: {field.name} must be more than 0, got {value}")
