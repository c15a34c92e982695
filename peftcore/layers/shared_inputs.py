"""The shared-input cache: outputs that one layer computes for sibling layers with the same input.

Query, key and value read one tensor. The first layer that is called computes the outputs of all its siblings, and each
sibling takes its cached output. A sibling reuses the cached output only if all of this holds:

- it is called with the identical, unchanged tensor, inside of the same call of the model;
- the same adapters are in effect;
- PyTorch is in the same mode (gradients, autocast, inference mode, training).

A sibling that did not take its output is left out from the next call on. The cache is emptied at the end of each call
of the model, because weights and adapters may change between two calls. Layers that are called by themselves share
nothing, and neither do layers in inference mode, whose tensors do not count in-place changes.

With few tokens, siblings share only the cast of their input (`widened_input`).

When activation checkpointing computes a layer again, the layer has the siblings of its first computation.
"""

import sys
import threading
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore._util.forward_records import ForwardRecord


class CachedOutput(NamedTuple):
    """An output that one layer has computed for a sibling."""

    computed_by: Any
    x: Tensor
    """The input itself, as the first layer got it."""
    version: int
    """In-place changes of x until then (count)."""
    in_effect: Any
    """`Selection.now` at that time: a route, or names."""
    mode: tuple[Any, ...]
    """Modes of PyTorch and of the sibling at that time."""
    y: Tensor


class RunningCall(NamedTuple):
    """A call of the model that has begun."""

    selection: Any
    """The model's `Selection`."""
    record: ForwardRecord | None
    """None for a call without gradients."""
    frame: FrameType
    """PyTorch's frame that runs the forward pass."""

    def is_interrupted(self) -> bool:
        """Return True if this thread has left the call. PyTorch runs no hook after a KeyboardInterrupt."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


class SharedInputCache(threading.local):
    """Running calls of one model and their cached outputs, separately for each thread."""

    def __init__(self) -> None:
        self.running: list[RunningCall] = []
        """Calls of the model, outermost first. An interrupted call stays until `calls` is read, which takes longer."""
        self.outputs: dict[Any, CachedOutput] = {}
        """{layer: its cached output}"""
        self.widened: tuple[Tensor, int, Tensor] | None = None
        """(input, its in-place changes until then, the input in a wider type)"""
        self.unused: list[tuple[Any, Any]] = []
        """(layer that computed, sibling that did not take the output)"""
        self.checked: Any = None
        """The `RowPlans` that were compared with the adapters in this call."""

    @property
    def calls(self) -> list[RunningCall]:
        """Running calls of the model, outermost first."""
        while self.running and not torch.compiler.is_compiling() and self.running[-1].is_interrupted():
            self.running[-1].selection.end_call(None)
        return self.running

    def clear(self, records: Iterable[ForwardRecord]) -> None:
        """Drop all outputs, and remove the siblings that did not take theirs from later calls.

        Args:
            records: forward passes that may be computed again; they keep the siblings as they were.
        """
        self.widened = self.checked = None
        if self.outputs:
            self.unused += [(cached.computed_by, layer) for layer, cached in self.outputs.items()]
            self.outputs.clear()
        for computed_by, layer in self.unused:
            for record in records:
                record.siblings.setdefault(computed_by, computed_by.siblings)
            computed_by.siblings = [other for other in computed_by.siblings if other is not layer]
        self.unused.clear()


def cached_output(layer: Any, x: Tensor, in_effect: Any) -> Tensor | None:
    """Return the output that a sibling has computed for this layer; None if there is none that fits.

    Args:
        layer: the layer that is called.
        x: its input.
        in_effect: `Selection.now`.
    """
    cache: SharedInputCache = layer.selection.cache
    if cache.outputs and (cached := cache.outputs.pop(layer, None)) is not None:
        unchanged = cached.x is x and cached.version == x._version
        if unchanged and cached.in_effect is in_effect and cached.mode == _mode(layer, x):
            return cached.y
        _note_unused(cache, cached.computed_by, layer)
    return None


def cache_outputs(layer: Any, x: Tensor, outputs: Iterable[tuple[Any, Tensor]]) -> None:
    """Cache outputs that `layer` has computed for siblings, as (sibling, output)."""
    in_effect: Any = None
    for sibling, y in outputs:
        in_effect = layer.selection.now if in_effect is None else in_effect
        cached = CachedOutput(layer, x, x._version, in_effect, _mode(sibling, x), y)
        layer.selection.cache.outputs[sibling] = cached


def widened_input(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the input in a wider type; inside of a call of the model, layers with the same input share one cast.

    Args:
        layer: the layer that is called.
        x: its input.
        dtype: the wider type.
    """
    cache: SharedInputCache = layer.selection.cache
    if not cache.running or x.is_inference():
        return x.to(dtype)
    if (widened := cache.widened) is not None:
        of, version, wide = widened
        if of is x and version == x._version and wide.dtype is dtype:
            return wide
    wide = x.to(dtype)
    cache.widened = x, x._version, wide
    return wide


def siblings_of(layer: Any, x: Tensor) -> Sequence[Any]:
    """Return the layers that are expected to be called after this one with the same x.

    The list is the same object until a sibling joins or leaves. It is empty outside of a call of the model, in
    inference mode, and for a DataParallel replica, which knows only the siblings of its original.
    """
    if is_replica(layer) or x.is_inference():
        return ()
    siblings, cache = layer.siblings, layer.selection.cache
    if not cache.running or (siblings and not cache.calls):
        record = layer.selection.recomputed
        if record is None or not record.is_call:
            return ()
        siblings = record.siblings.get(layer, siblings)
    if cache.outputs:
        for sibling in siblings:
            if (cached := cache.outputs.pop(sibling, None)) is not None:
                _note_unused(cache, cached.computed_by, sibling)
    return siblings


def is_replica(layer: Any) -> bool:
    """Return True if DataParallel made the layer for one forward."""
    return "_is_replica" in layer.__dict__


def _note_unused(cache: SharedInputCache, computed_by: Any, layer: Any) -> None:
    """Note that a layer did not take its output, so that the next call leaves the layer out.

    A recomputation notes nothing, because it may stop before the layer is called.
    """
    if cache.running:
        cache.unused.append((computed_by, layer))


def _mode(layer: Any, x: Tensor) -> tuple[Any, ...]:
    """Return the modes that an output depends on, besides input, weights and adapters."""
    device = x.device.type
    casts = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    return layer.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype
