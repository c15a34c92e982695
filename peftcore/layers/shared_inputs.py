"""What layers of one input compute for one another, inside of one call of the model.

The first layer that sees an input computes for the others that are expected to read it. They take what is theirs only
if they are called with that very tensor, unchanged, while the same adapters act and PyTorch computes in the same way
(gradients, autocast, inference mode, training); a layer that was not called so is left out from then on. What nobody
asked for is forgotten at the end of the call: between two calls weights and adapters change, and within one only what
is compared here does. Layers that are called by themselves compute for themselves, and so do layers whose input is a
tensor of inference mode, which counts no changes in place.

Activation checkpointing computes layers again as they were computed: each for those that it computed for then.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util.forward_records import ForwardRecord


class Waiting(NamedTuple):
    """What the first layer that saw an input has computed for another one."""

    giver: Any
    """The first layer."""
    x: Tensor
    """The input itself, as the first layer got it."""
    version: int
    """How often it had been changed in place by then."""
    acting: Any
    """The route, or the tuple of active names, by which it was computed."""
    mode: tuple[Any, ...]
    """The other's and PyTorch's modes by then."""
    y: Tensor
    """The other's output."""


class ThisThread(threading.local):
    """The calls of one model that run in a thread, and what waits there, by the layer that it waits for."""

    def __init__(self) -> None:
        self.calls: list[ForwardRecord | None] = []
        """Outermost first; None: without gradients."""
        self.by_layer: dict[Any, Waiting] = {}
        self.left: list[tuple[Any, Any]] = []
        """(layer, another one that has not asked for what it was given)"""

    def forget(self, records: Iterable[ForwardRecord]) -> None:
        """Let go of what the call has left, and compute no more for layers that did not ask.

        records: of forward passes that may be computed again, as they were.
        """
        if self.by_layer:
            self.left += [(waiting.giver, layer) for layer, waiting in self.by_layer.items()]
            self.by_layer.clear()
        for giver, layer in self.left:
            for record in records:
                record.sharing.setdefault(giver, giver.sharing)
            giver.sharing = [other for other in giver.sharing if other is not layer]
        self.left.clear()


def given(layer: Any, x: Tensor, acting: Any) -> Tensor | None:
    """What another layer has computed for this one, if it would compute the same; to be asked first.

    acting: `Selection.now`.
    """
    here: ThisThread = layer.selection.here
    if here.by_layer and (waiting := here.by_layer.pop(layer, None)) is not None:
        unchanged = waiting.x is x and waiting.version == x._version
        if unchanged and waiting.acting is acting and waiting.mode == _mode(layer, x):
            return waiting.y
        _note_left(here, waiting.giver, layer)
    return None


def give(layer: Any, x: Tensor, outputs: Iterable[tuple[Any, Tensor]]) -> None:
    """Keep what was computed for others until they ask."""
    acting: Any = None
    for other, y in outputs:
        acting = layer.selection.now if acting is None else acting
        layer.selection.here.by_layer[other] = Waiting(layer, x, x._version, acting, _mode(other, x), y)


def neighbours(layer: Any, x: Tensor) -> Sequence[Any]:
    """Layers expected to be called after this one with the same x, but for those that left what they were given.

    The same object for as long as they stay the same. A replica that DataParallel made has none: it knows the
    neighbours of its original, not its own.
    """
    if is_replica(layer) or x.is_inference():
        return ()
    sharing, here = layer.sharing, layer.selection.here
    if not here.calls:
        record = layer.selection.recomputed
        if record is None or not record.is_call:
            return ()
        sharing = record.sharing.get(layer, sharing)
    if here.by_layer:
        for other in sharing:
            if (waiting := here.by_layer.pop(other, None)) is not None:
                _note_left(here, waiting.giver, other)
    return sharing


def is_replica(layer: Any) -> bool:
    """Whether DataParallel made the layer for one forward."""
    return "_is_replica" in layer.__dict__


def _note_left(here: ThisThread, giver: Any, layer: Any) -> None:
    """Have a layer left out from the next call on. A recomputation, which may break off early, shows nothing."""
    if here.calls:
        here.left.append((giver, layer))


def _mode(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """What a layer's output depends on besides its input, its weights and the adapters that act."""
    device = x.device.type
    casts = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    return layer.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype
