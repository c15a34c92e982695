"""Resource limits of a server."""

from dataclasses import dataclass, fields

from peftcore.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Resource limits of a server.

    Raises:
        ConfigError: A limit is not above 0.
    """

    max_batch: int = 16
    """Rows decoded together (count)."""
    max_queue: int = 256
    """Requests that wait for a row (count); further requests are refused."""
    max_tokens: int = 1024
    """Most tokens of one completion (count)."""
    max_context: int | None = None
    """Most tokens of prompt and completion together (count). None: the model's own limit."""
    prefill_tokens: int = 256
    """Prompt tokens, with padding, of one prefill forward (count). A longer prompt takes several forwards, and running
    rows decode a token between two of them."""
    prefix_cache: int | None = 256 << 20
    """Most memory for keys and values of earlier prompts, which later prompts with the same beginning reuse (bytes).
    None: nothing is reused."""
    max_grammar: int = 64 << 10
    """Largest JSON schema or other grammar of an answer (bytes)."""
    grammar_seconds: float = 10.0
    """Time until a grammar must be compiled (seconds)."""
    grammar_cache: int = 64
    """Compiled grammars that are kept for later requests (count)."""
    max_body: int = 4 << 20
    """Largest body of a request (bytes)."""
    read_timeout: float = 20.0
    """Time from a connection's start to the last byte of its request (seconds)."""
    keep_alive: int = 75
    """Time that an idle connection stays open for a further request (seconds). A proxy before the server must have a
    shorter one (nginx and AWS: 60), or it sends requests to connections that are just being closed."""
    timeout: float = 300.0
    """Time from a request's arrival to its last token (seconds)."""
    grace: float = 30.0
    """Time for running requests to complete at shutdown (seconds)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ConfigError(f"Limits: {field.name} must be above 0, got {value}")
