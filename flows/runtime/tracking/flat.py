"""Nested results as flat names, for backends that have no nesting."""

import math
from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Return {path: value} of nested mappings; None and empty mappings are left out."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{path}{separator}", separator)
        elif value is not None:
            result[path] = value
    return result


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of flat values; true and false are no numbers."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
