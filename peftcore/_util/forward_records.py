"""Records of forward passes, for layers that activation checkpointing computes again in the backward.

A recomputation has to see the adapters and the adapter arguments of its own forward pass, and other forward passes may
have run since. PyTorch numbers autograd nodes in the order in which a thread makes them, and tells which node the
backward is at. So a record keeps the range of numbers from the beginning to the end of its forward pass. The record is
owned by the graph: by the nodes of the model's outputs.

A recomputation belongs to the record whose range holds the number of the current node. Two threads number their nodes
alike, so records whose outputs take part in this very backward come first; where two threads are left and their records
differ, that is an error.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

from peftcore.errors import RoutingError


class ForwardRecord:
    """One forward pass, or a stretch of code inside of which the same adapters act."""

    def __init__(self, owner: Any, in_effect: Any, values: Mapping[Any, Mapping[str, Any]], is_call: bool):
        self.owner, self.in_effect, self.values = owner, in_effect, values
        """owner: the selection of the model; in_effect: its route or active names; values: {shared module of an adapter:
        {attribute: value}}, what the adapter arguments of this pass came to."""
        self.is_call = is_call
        """Whether it is one call of the model, inside of which layers share inputs."""
        self.siblings: dict[Any, Sequence[Any]] = {}
        """{layer: the layers that it computed for}, where these have become others since."""
        self.thread, _HERE.records = _HERE.number, True
        self.order = next(_ORDER)
        """Later records of a thread are inside of earlier ones."""
        self.first, self.end = _next_number(), math.inf
        self._tasks: set[int] = set()
        """Backward passes that have come to one of the outputs."""
        with _LOCK:
            _LIVE.add(self)

    def close(self, outputs: Any = None) -> None:
        """End the range here, and have the graph of these outputs own the record."""
        self.end = _next_number()
        for node in {tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None}:
            node.register_prehook(self._note_backward)

    def _note_backward(self, _gradients: Any) -> None:
        self._tasks.add(torch._C._current_graph_task_id())

    def takes_part(self, task: int) -> bool:
        """Whether a backward pass has come to one of the outputs."""
        return task in self._tasks


_LIVE: WeakSet[ForwardRecord] = WeakSet()
_LOCK = threading.Lock()
_ORDER = itertools.count()


class _RunningBackward:
    """Lives as long as PyTorch keeps it as a callback of a backward pass: to its end, also by an error."""

    def __call__(self) -> None:
        """Do nothing, at the end of the backward pass."""


class _Recomputation(NamedTuple):
    """What was looked up for one node of one backward pass."""

    task: int
    node: int
    """Its number."""
    record: ref[ForwardRecord]
    running: ref[_RunningBackward]


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.of: dict[Any, _Recomputation] = {}
        """The recomputation that this thread has looked up last, of each owner."""
        self.number = next(_ORDER)
        """Of this thread; Python's own is used again by later ones."""
        self.records = False
        """Whether this thread has run a forward pass itself."""


_HERE = _ThisThread()


def recomputed(owner: Any) -> ForwardRecord | None:
    """The record, of this owner, of the forward pass that the current backward computes again; None outside of that."""
    return _looked_up(id(owner), lambda record: record.owner is owner, lambda record: (record.in_effect, record.siblings))


def recomputed_values(shared: Any) -> Mapping[str, Any] | None:
    """What the adapter arguments came to in that forward pass, for the shared module of an adapter."""
    record = _looked_up(id(shared), lambda record: shared in record.values, lambda record: record.values[shared])
    return None if record is None else record.values[shared]


def live_records(owner: Any) -> list[ForwardRecord]:
    """Records of an owner whose layers may still be computed again."""
    with _LOCK:
        return [record for record in _LIVE if record.owner is owner]


def _looked_up(
    key: int, fits: Callable[[ForwardRecord], bool], content: Callable[[ForwardRecord], Any]
) -> ForwardRecord | None:
    task = torch._C._current_graph_task_id()
    node = None if task == -1 else torch._C._current_autograd_node()
    if node is None:
        return None
    number = node._sequence_nr()
    last = _HERE.of.get(key)
    if last is not None and last.task == task and last.node == number:
        return last.record()
    with _LOCK:
        found = [record for record in _LIVE if record.first <= number < record.end and fits(record)]
    threads = {record.thread for record in found if record.takes_part(task)}
    if not threads and _HERE.records:  # otherwise this is a thread that PyTorch made for backward passes alone
        threads = {_HERE.number}
    found = [record for record in found if record.thread in threads or not threads]
    if not found:  # of checkpoints inside a reentrant checkpoint, which have a backward of their own
        return None if last is None or last.running() is None else last.record()
    if len({record.thread for record in found}) > 1 and any(content(r) != content(found[0]) for r in found):
        raise RoutingError(
            "a backward pass computes layers again (activation checkpointing), and forward passes of several threads "
            "with different adapters are part of it, so their layers cannot be told apart; give each thread a backward "
            "of its own"
        )
    innermost = max(found, key=lambda record: record.order)
    running = None if last is None or last.task != task else last.running()
    if running is None:
        running = _RunningBackward()
        torch.autograd.Variable._execution_engine.queue_callback(running)  # type: ignore[attr-defined]
    _HERE.of[key] = _Recomputation(task, number, ref(innermost), ref(running))
    return innermost


def _next_number() -> int:
    """The number that this thread's next autograd node gets."""
    return torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Tensors in what a model gives, whatever holds them."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)
    elif hasattr(outputs, "__dataclass_fields__"):
        yield from _tensors(vars(outputs))
