"""What layers of one input compute for one another.

The first layer that sees an input computes for the others that are expected to read it. They take what is theirs only
if they are called with that very tensor, unchanged; a layer that was not called so is left out from then on.
"""

import threading
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Waiting(NamedTuple):
    """What the first layer that saw an input has computed for another one."""

    giver: Any
    """The first layer."""
    x: Tensor
    """The input itself, as the first layer got it."""
    version: int
    """How often it had been changed in place by then."""
    y: Tensor
    """The other's output."""


class Waitings(threading.local):
    """What waits in each thread, by the layer that it waits for."""

    def __init__(self) -> None:
        self.by_layer: dict[Any, Waiting] = {}


def given(layer: Any, x: Tensor) -> Tensor | None:
    """What another layer has computed for this one, if it was from this very x; to be asked first."""
    waiting: MutableMapping[Any, Waiting] = layer.selection.waiting.by_layer
    if waiting and (left := waiting.pop(layer, None)) is not None:
        if left.x is x and left.version == _version(x):
            return left.y
        _stop_giving(left, layer)
    return None


def give(layer: Any, x: Tensor, outputs: Iterable[tuple[Any, Tensor]]) -> None:
    """Keep what was computed for others until they ask."""
    waiting, version = layer.selection.waiting.by_layer, _version(x)
    for other, y in outputs:
        waiting[other] = Waiting(layer, x, version, y)


def neighbours(layer: Any) -> Sequence[Any]:
    """Layers expected to be called after this one with the same x, but for those that left what they were given.

    The same object for as long as they stay the same. A replica that DataParallel made has none: it knows the
    neighbours of its original, not its own.
    """
    if is_replica(layer):
        return ()
    if waiting := layer.selection.waiting.by_layer:
        for other in layer.sharing:
            if (left := waiting.pop(other, None)) is not None:
                _stop_giving(left, other)
    return layer.sharing


def is_replica(layer: Any) -> bool:
    """Whether DataParallel made the layer for one forward."""
    return "_is_replica" in layer.__dict__


def _stop_giving(left: Waiting, layer: Any) -> None:
    """Have a layer left out, because it has not asked for what it was given."""
    left.giver.sharing = [other for other in left.giver.sharing if other is not layer]


def forget(waiting: MutableMapping[Any, Waiting]) -> None:
    """Let go of what the last forward of the model has left: memory, and a guess that did not come true."""
    for layer, left in waiting.items():
        _stop_giving(left, layer)
    waiting.clear()


def _version(x: Tensor) -> int:
    """How often x has been changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version
