"""What differs between two versions: figures, parameters, data, code and software, from their lineage records."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PARTS = (
    "metrics",
    "params",
    "ranks",
    "data",
    "evaluation_set",
    "base_model",
    "dvc",
    "adapter",
    "git",
    "software",
    "machine",
)
"""What of a record says how a version came to be, in the order in which it is told."""


class Difference(NamedTuple):
    """One value that is another one in the second record; None where a record has none."""

    part: str
    key: str
    before: Any
    after: Any

    @property
    def change(self) -> float | None:
        """After - before, where both are numbers."""
        numbers = [value for value in (self.before, self.after) if type(value) in (int, float)]
        return self.after - self.before if len(numbers) == 2 else None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Every value in which two records differ, by part and key; `git.uncommitted` counts as one value."""
    found = []
    for part in PARTS:
        old, new = (dict(_flat(record.get(part))) for record in (before, after))
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                found.append(Difference(part, key, old.get(key), new.get(key)))
    return found


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} as ("a.b", 1)"""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
