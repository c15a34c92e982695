"""Fingerprints of adapters: a cheap check that cached values were computed from the current weights.

PyTorch does not report every change of a weight, so a cache compares a fingerprint before each use. A fingerprint
detects:

- in-place operations that autograd counts (`_version`), such as `copy_` under `no_grad` and unfused optimisers;
- another tensor, other memory or another number of elements in a parameter's place: assignment,
  `load_state_dict(assign=True)`, `functional_call`, `swap_tensors`, `parameter.data = ...`, `to`;
- a step of any `torch.optim.Optimizer` in this process: fused and 8-bit kernels write weights without changing their
  version, and sharded optimisers write other tensors than the ones they step;
- an attribute set on an adapter, such as `scaling`; `train()` and `eval()` of a module around it set one too;
- an edit in place through `.data` of a trainable tensor on the CPU, which training loops written by hand make: some
  elements of the tensor, spread over its rows and columns, are compared.

It does not detect edits in place through `.data`, or of memory shared with NumPy, of frozen tensors, of tensors on
other devices, and of so few elements that none of them is compared. Call `Adapter.mark_changed`, or
`refresh_adapters(model)` for all adapters, after them.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0
"""Steps that optimisers have taken in this process (count)."""
SAMPLES = 16
"""Elements of a trainable tensor that are compared (count)."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{bytes of an element: type whose values are the element's bits}"""
_SCOPE: ContextVar[object | None] = ContextVar("peftcore_unchanging_weights", default=None)
"""The `unchanging_weights` context that this thread is in."""


def _count_step(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


@contextlib.contextmanager
def unchanging_weights() -> Iterator[None]:
    """Promise that no weight is edited inside of the context, so each fingerprint reads the tensors only once.

    `generate` makes this promise. Optimiser steps and attribute assignments are noticed inside, too.
    """
    token = _SCOPE.set(object())
    try:
        yield
    finally:
        _SCOPE.reset(token)


def unchanging_scope() -> object | None:
    """Return the `unchanging_weights` context that this thread is in, or None."""
    return _SCOPE.get()


class Fingerprint:
    """The identity of the current weights of some adapters, with a sample of the values that train.

    Args:
        adapters: The adapters (`peftcore.adapter.Adapter`).
    """

    __slots__ = (
        "_attributes",
        "_changes",
        "_sampled",
        "_samples",
        "_scope",
        "_steps",
        "_storages",
        "_tables",
        "_tensors",
        "countable",
        "trains",
    )

    def __init__(self, adapters: Iterable[nn.Module]):
        distinct = list(dict.fromkeys(adapters))
        self._attributes = [vars(adapter) for adapter in distinct]  # not the adapters, which a cache may hold weakly
        modules = dict.fromkeys(module for adapter in distinct for module in adapter.modules())
        tables = [table for module in modules for table in (module._parameters, module._buffers)]
        self._tables = [table for table in tables if any(tensor is not None for tensor in table.values())]
        tensors = [tensor for table in self._tables for tensor in table.values() if tensor is not None]
        self.countable = all(type(each) in (nn.Parameter, Tensor) and not each.is_inference() for each in tensors)
        """True if changes can be noticed: inference tensors have no version, and sharded ones lie elsewhere."""
        self.trains = any(tensor.requires_grad for tensor in tensors)
        """True if a weight is trainable: hand-written training loops often edit such weights through `.data`."""
        self._samples = _samples([tensor for tensor in tensors if tensor.requires_grad]) if self.countable else None
        self._sampled = [sample.tobytes() for sample in self._samples or ()]
        self._steps, self._scope = _optimizer_steps, unchanging_scope()
        self._changes = [attributes.get("changes") for attributes in self._attributes]
        self._tensors = self._identities() if self.countable else []
        # kept alive, because the address of freed memory can be reused for other weights
        self._storages = [tensor.untyped_storage() for tensor in tensors] if self.countable else []

    def holds(self, trusts_learning: bool = False) -> bool:
        """Return True if no change is noticed since the fingerprint was made.

        Args:
            trusts_learning: The assumption for trainable tensors whose elements cannot be compared, such as those on a
                GPU. True: every change of these tensors is counted by autograd or by an optimiser. False: they may have
                changed, unless an `unchanging_weights` context is open; use False for values that are cheap to
                recompute.
        """
        if (
            not self.countable
            or self._steps != _optimizer_steps
            or self._changes != [attributes.get("changes") for attributes in self._attributes]
        ):
            return False
        scope = unchanging_scope()
        if scope is not None and scope is self._scope:
            return True
        if self._samples is None and not trusts_learning:
            return False
        if self._tensors != self._identities() or self._sampled != [each.tobytes() for each in self._samples or ()]:
            return False
        self._scope = scope
        return True

    def _identities(self) -> list[tuple[int, int, int, bool]]:
        return [
            (tensor.data_ptr(), tensor.numel(), tensor._version, tensor.requires_grad)
            for table in self._tables
            for tensor in table.values()
            if tensor is not None
        ]


def _samples(tensors: Iterable[Tensor]) -> list[Any] | None:
    """Return views of some elements of each tensor as NumPy arrays; None if a tensor's memory cannot be viewed."""
    samples = []
    for tensor in tensors:
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.element_size() not in _INTEGERS:
            return None
        # an odd step, so that the elements lie in different columns of a matrix whose rows have an even length
        step = max(1, tensor.numel() // SAMPLES) | 1
        samples.append(tensor.detach().flatten()[::step].view(_INTEGERS[tensor.element_size()]).numpy())
    return samples
