"""What one call of the model tells its layers, kept apart for each thread that calls it."""

import threading
from typing import Any

import torch


class PerThread:
    """An attribute of which every thread sees the value that it has set itself.

    A thread that has set none sees the last one: on a GPU the backward, which may compute layers again, runs in a
    thread of its own. Copies and pickles have the default.
    """

    def __init__(self, default: Any = None):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}_of_threads"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        held: _Held | None = instance.__dict__.get(self.name)
        if held is None:
            return self.default
        if torch.compiler.is_compiling():  # which traces no threads
            return held.last[0]
        return getattr(held, "own", held.last)[0]

    def __set__(self, instance: Any, value: Any) -> None:
        held = instance.__dict__.get(self.name)
        if held is None:
            held = instance.__dict__[self.name] = _Held([self.default], self.default)
        held.own = [value]
        held.last[0] = value


class _Held(threading.local):
    own: list[Any]

    def __init__(self, last: list[Any], default: Any):
        self.last, self.default = last, default
        """last: one element, the same list in every thread."""

    def __reduce__(self) -> Any:
        return _Held, ([self.default], self.default)
