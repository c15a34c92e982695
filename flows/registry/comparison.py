"""Differences between the lineage records of two versions: figures, parameters, data, code and software."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PARTS = (
    "metrics",
    "params",
    "ranks",
    "data",
    "evaluation_set",
    "base_model",
    "calibrated_base",
    "dvc",
    "adapter",
    "git",
    "software",
    "machine",
)
"""Compared parts of a record, in the order of the report."""


class Difference(NamedTuple):
    """A value that differs between two records; None if a record lacks it."""

    part: str
    key: str
    before: Any
    after: Any

    @property
    def change(self) -> float | None:
        """The difference, after - before; None unless both are numbers."""
        numbers = [value for value in (self.before, self.after) if type(value) in (int, float)]
        return self.after - self.before if len(numbers) == 2 else None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return every value in which two records differ, by part and key; a list counts as one value."""
    result = []
    for part in PARTS:
        old, new = (dict(_flat(record.get(part))) for record in (before, after))
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                result.append(Difference(part, key, old.get(key), new.get(key)))
    return result


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with dotted keys: ("a.b", 1) for {"a": {"b": 1}}."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
