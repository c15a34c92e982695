"""Fingerprints of adapters: a cheap check that cached values were computed from the current weights.

Nothing tells a cache of every change of a weight, so a fingerprint is compared before each use. It notices:

- in-place operations that autograd counts (`_version`), such as `copy_` under `no_grad` and unfused optimisers;
- another tensor, or other memory, in a parameter's place: assignment, `load_state_dict(assign=True)`,
  `functional_call`, `swap_tensors`, `parameter.data = ...`, `to`;
- a step of any `torch.optim.Optimizer` in this process: fused and 8-bit kernels write weights without changing their
  version, and sharded optimisers write other tensors than the ones they step;
- an attribute set on an adapter, such as `scaling`; `train()` and `eval()` of a module around it set one too.

Edits in place through `.data`, or of memory shared with NumPy, are not noticed; call `Adapter.mark_changed` after them.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from peftcore.adapter import Adapter

_optimizer_steps = 0
"""Steps that optimisers have taken in this process (count)."""
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


class Fingerprint:
    """The identity of the current weights of some adapters, without their values."""

    __slots__ = (
        "_attributes",
        "_changes",
        "_scope",
        "_steps",
        "_storages",
        "_tables",
        "_tensors",
        "countable",
        "trains",
    )

    def __init__(self, adapters: Iterable[Adapter]):
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
        self._steps, self._scope = _optimizer_steps, _SCOPE.get()
        self._changes = [attributes.get("changes") for attributes in self._attributes]
        self._tensors = self._identities() if self.countable else []
        # kept alive, because the address of freed memory can be reused for other weights
        self._storages = [tensor.untyped_storage() for tensor in tensors] if self.countable else []

    def holds(self, trusts_learning: bool = True) -> bool:
        """Return True if no change is noticed since the fingerprint was made.

        Args:
            trusts_learning: False for values that are cheap to recompute: a fingerprint of trainable weights then
                holds only inside of one `unchanging_weights` context.
        """
        if (
            not self.countable
            or self._steps != _optimizer_steps
            or self._changes != [attributes.get("changes") for attributes in self._attributes]
        ):
            return False
        scope = _SCOPE.get()
        if scope is not None and scope is self._scope:
            return True
        if (self.trains and not trusts_learning) or self._tensors != self._identities():
            return False
        self._scope = scope
        return True

    def _identities(self) -> list[tuple[int, int, bool]]:
        return [
            (tensor.data_ptr(), tensor._version, tensor.requires_grad)
            for table in self._tables
            for tensor in table.values()
            if tensor is not None
        ]
