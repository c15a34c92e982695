"""Options of `peftcore serve`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.params import Params
from flows.paths import Paths
from peftcore.errors import ConfigError

if TYPE_CHECKING:
    from peftcore.composition import Composition
    from peftcore.serving import Limits

KEYS = "PEFTCORE_API_KEYS"
"""Environment variable with API keys, separated by commas; unlike a command line, other users cannot read it."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server."""

    base: Path
    """Folder of the base model."""
    limits: "Limits"
    """Limits of requests and of the queue."""
    adapters: Path | None = None
    """Folder of adapters."""
    mixtures: Sequence[str] = ()
    """Compositions, written `NAME={"adapter": weight}`."""
    project: tuple[Paths, Params] | None = None
    """Project whose champion is served and followed."""
    seconds: float = 5.0
    """Seconds between two checks of the registry."""
    git_remote: str | None = None
    """Git remote whose tags are fetched at each check."""
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    """Second port, for monitoring without a key; None: no such port."""
    name: str | None = None
    """Name of the base model; None: the name of its folder."""
    max_loaded: int = 64
    """Maximum number of adapters in the model at a time."""
    dtype: str = "auto"
    """Dtype of the base's weights; must be "auto" with `project`."""
    adapter_dtype: str = "auto"
    """Dtype of the adapters' weights: "auto", the base's, or "float32"."""
    load_from: Path | None = None
    """Folder below which clients may load adapters; None: they may not."""
    chat_template: Path | None = None
    """File with a chat template in place of the base's; None: the base's."""
    tool_call_parser: str | None = None
    """Form of the model's tool calls; None: that of the chat template."""
    keys: Sequence[str] = ()
    """API keys, in addition to those of the environment variable."""
    record: Path | None = None
    """Folder for records of answers and ratings; None: nothing is recorded."""
    record_bytes: int = 256 << 20
    """Largest size of the records (bytes)."""
    redact: Path | None = None
    """YAML file of redaction rules; None: texts are recorded as they are."""


def parse_compositions(texts: Sequence[str]) -> "dict[str, Composition]":
    """Return {name: composition} of texts such as `mix={"sql": 0.7, "chat": 0.3}`.

    Raises:
        ConfigError: A text has another form.
    """
    from peftcore.composition import Weighted

    compositions: dict[str, Composition] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            weights = json.loads(value)
        except json.JSONDecodeError:
            weights = None
        if not name or not isinstance(weights, dict) or not weights or {*map(type, weights.values())} - {int, float}:
            raise ConfigError(f'--composition {text!r}: give NAME={{"adapter": weight, ...}} with numbers for weights')
        compositions[name] = Weighted(weights)
    return compositions
