"""Typed errors of the package. Each message states the given value, the values that fit, and the next step."""

import difflib
from collections.abc import Collection


def suggestion(word: str, known: Collection[str]) -> str:
    """Return "; did you mean X?" for the end of an error message, or the known words if none is similar."""
    similar = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {similar[0]!r}?" if similar else f"; known: {', '.join(sorted(known))}"


class PeftError(Exception):
    """Anything that peftcore refuses; catch this to catch them all."""


class ConfigError(PeftError, ValueError):
    """A configuration that cannot be: unknown key, wrong type, impossible value."""


class TargetError(PeftError, ValueError):
    """Targets that match nothing, or match layers that cannot be adapted."""


class AdapterNameError(PeftError, ValueError):
    """An adapter name that is taken, unknown or not allowed."""


class CheckpointError(PeftError, ValueError):
    """An adapter directory that is corrupt, foreign, incomplete or made for another base."""


class MergeError(PeftError, RuntimeError):
    """A merge that would write something wrong; nothing has been changed."""


class TrainingError(PeftError, RuntimeError):
    """Training that cannot go on: nothing to train, a loss that is not finite, a broken checkpoint."""


class RoutingError(PeftError, ValueError):
    """A batch whose rows cannot be computed by the adapters that were asked for."""


class AdapterStoreError(PeftError, RuntimeError):
    """An adapter that a store cannot give now: no room that is free, or one that can never fit."""
