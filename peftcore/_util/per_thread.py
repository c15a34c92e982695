"""What one call of the model tells its layers, kept apart for each thread that calls it."""

import threading
from typing import Any

import torch

from peftcore._util.forward_records import recomputed_values


class PerThread:
    """An attribute of which every thread sees the value that it has set itself.

    Layers that activation checkpointing computes again see the value of their own forward pass. A thread that has set
    none sees the last one. Copies and pickles have the default.
    """

    def __init__(self, default: Any = None):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute, self.name = name, f"_{name}_of_threads"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        held: _Held | None = instance.__dict__.get(self.name)
        if held is None:
            return self.default
        if torch.compiler.is_compiling():  # which traces no threads
            return held.last[0]
        own = getattr(held, "own", held.last)
        backward = torch._C._current_graph_task_id()
        if backward != -1 and (own is held.last or held.backward != backward):
            values = recomputed_values(instance)
            if values is not None and self.attribute in values:
                return values[self.attribute]
        return own[0]

    def __set__(self, instance: Any, value: Any) -> None:
        held = instance.__dict__.get(self.name)
        if held is None:
            held = instance.__dict__[self.name] = _Held([self.default], self.default)
        held.own = [value]
        held.last[0] = value
        if not torch.compiler.is_compiling():
            held.backward = torch._C._current_graph_task_id()


def values_of(instance: Any) -> dict[str, Any]:
    """The attributes of this kind that an object has, as this thread sees them."""
    names = [name for kind in type(instance).__mro__ for name, own in vars(kind).items() if isinstance(own, PerThread)]
    return {name: getattr(instance, name) for name in names}


class _Held(threading.local):
    own: list[Any]
    backward: int = -1
    """The backward pass inside of which this thread has set its own; -1: none."""

    def __init__(self, last: list[Any], default: Any):
        self.last, self.default = last, default
        """last: one element, the same list in every thread."""

    def __reduce__(self) -> Any:
        return _Held, ([self.default], self.default)
