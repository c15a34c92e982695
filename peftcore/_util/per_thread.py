"""Attributes with a separate value for each thread, for adapter arguments of the current model call."""

import threading
from typing import Any

import torch

from peftcore._util.forward_records import recomputed_values


class PerThread:
    """A descriptor for a thread-local attribute.

    A thread reads the value that it has set. A thread that has set no value reads the last value of any thread. Layers
    that activation checkpointing recomputes read the value of their own forward pass. Copies and pickles start with the
    default.
    """

    def __init__(self, default: Any = None):
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute, self.storage = name, f"_{name}_of_threads"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        values: _ThreadValues | None = instance.__dict__.get(self.storage)
        if values is None:
            return self.default
        if torch.compiler.is_compiling():  # the compiler cannot trace thread-local storage
            return values.last[0]
        current = getattr(values, "current", values.last)
        backward = torch._C._current_graph_task_id()
        if backward != -1 and (current is values.last or values.backward != backward):
            recomputed = recomputed_values(instance)
            if recomputed is not None and self.attribute in recomputed:
                return recomputed[self.attribute]
        return current[0]

    def __set__(self, instance: Any, value: Any) -> None:
        values = instance.__dict__.get(self.storage)
        if values is None:
            values = instance.__dict__[self.storage] = _ThreadValues([self.default], self.default)
        values.current = [value]
        values.last[0] = value
        if not torch.compiler.is_compiling():
            values.backward = torch._C._current_graph_task_id()


def values_of(instance: Any) -> dict[str, Any]:
    """Return the current thread's values of all `PerThread` attributes of an object, by attribute name."""
    classes = type(instance).__mro__
    names = [name for each in classes for name, value in vars(each).items() if isinstance(value, PerThread)]
    return {name: getattr(instance, name) for name in names}


class _ThreadValues(threading.local):
    current: list[Any]
    """The value that this thread has set, as a list of one element; absent before that."""
    backward: int = -1
    """Id of the backward pass in which this thread has set its value; -1 outside of a backward pass."""

    def __init__(self, last: list[Any], default: Any):
        self.last, self.default = last, default
        """last: the last value of any thread, as a list of one element that all threads share."""

    def __reduce__(self) -> Any:
        return _ThreadValues, ([self.default], self.default)
