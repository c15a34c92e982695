"""Arguments of functions, to compare with HF PEFT's."""

import inspect
from typing import Any


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    """Return (name, kind, default) of each argument, in order."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
