"""Records of forward passes, for layers that activation checkpointing recomputes in the backward pass.

A recomputed layer must use the adapters and adapter arguments of its own forward pass, although other forward passes
may have run since. PyTorch numbers autograd nodes in the order in which a thread creates them, and exposes the node
that the backward pass is executing. So a record stores the first and last node number of its forward pass. The
autograd graph owns the record, through the nodes of the model's outputs.

A recomputation belongs to the record whose range contains the current node's number. Each thread numbers its nodes
separately, so ranges of different threads overlap. Records whose outputs take part in the current backward pass are
preferred. If records of several threads remain and their adapters differ, an error is raised.
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
    """One forward pass, or one `with` block with fixed active adapters.

    Args:
        owner: The model's selection of adapters.
        in_effect: The route or the names of the active adapters.
        values: Adapter arguments of this pass: {shared module of an adapter: {attribute: value}}.
        is_call: True for one call of the model; layers share inputs only inside one call.
    """

    def __init__(self, owner: Any, in_effect: Any, values: Mapping[Any, Mapping[str, Any]], is_call: bool):
        self.owner, self.in_effect, self.values = owner, in_effect, values
        self.is_call = is_call
        self.siblings: dict[Any, Sequence[Any]] = {}
        """{layer: sibling layers that it computed for in this pass}, for layers whose siblings have changed since."""
        self.thread, _HERE.records = _HERE.number, True
        self.order = next(_ORDER)
        """Creation order; a later record of the same thread is nested in an earlier one."""
        self.first, self.end = _next_number(), math.inf
        self._tasks: set[int] = set()
        """Ids of backward passes that have reached one of the outputs."""
        with _LOCK:
            _LIVE.add(self)

    def close(self, outputs: Any = None) -> None:
        """End the range of node numbers, and let the autograd graph of `outputs` own the record."""
        self.end = _next_number()
        for node in {tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None}:
            node.register_prehook(self._note_backward)

    def _note_backward(self, _gradients: Any) -> None:
        self._tasks.add(torch._C._current_graph_task_id())

    def takes_part(self, task: int) -> bool:
        """Return True if the backward pass with id `task` has reached one of the outputs."""
        return task in self._tasks


_LIVE: WeakSet[ForwardRecord] = WeakSet()
_LOCK = threading.Lock()
_ORDER = itertools.count()


class _RunningBackward:
    """An object that lives as long as one backward pass.

    PyTorch holds the object as a callback until the backward pass ends or fails. A dead weak reference shows the end.
    """

    def __call__(self) -> None:
        """Do nothing; PyTorch calls this at the end of the backward pass."""


class _Recomputation(NamedTuple):
    """The last look-up of a thread: the record of one node in one backward pass."""

    task: int
    node: int
    """Number of the autograd node."""
    record: ref[ForwardRecord]
    running: ref[_RunningBackward]


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.last: dict[Any, _Recomputation] = {}
        """{id of an owner or shared module: the last look-up of this thread}"""
        self.number = next(_ORDER)
        """Number of this thread; Python reuses its own thread ids."""
        self.records = False
        """True if this thread has run a forward pass; PyTorch's own backward threads have not."""


_HERE = _ThisThread()


def recomputed(owner: Any) -> ForwardRecord | None:
    """Return the record of the forward pass that is being recomputed; None outside of a recomputation.

    Args:
        owner: The model's selection of adapters.

    Raises:
        RoutingError: Forward passes of several threads with different adapters fit.
    """
    return _looked_up(
        id(owner), lambda record: record.owner is owner, lambda record: (record.in_effect, record.siblings)
    )


def recomputed_values(shared: Any) -> Mapping[str, Any] | None:
    """Return the adapter arguments of the forward pass that is being recomputed; None outside of a recomputation.

    Args:
        shared: The shared module of an adapter that holds the arguments.
    """
    record = _looked_up(id(shared), lambda record: shared in record.values, lambda record: record.values[shared])
    return None if record is None else record.values[shared]


def live_records(owner: Any) -> list[ForwardRecord]:
    """Return the records of an owner whose layers may still be recomputed."""
    with _LOCK:
        return [record for record in _LIVE if record.owner is owner]


def _looked_up(
    key: int, matches: Callable[[ForwardRecord], bool], content: Callable[[ForwardRecord], Any]
) -> ForwardRecord | None:
    """Return the matching record of the current autograd node; `content` is compared between threads."""
    task = torch._C._current_graph_task_id()
    node = None if task == -1 else torch._C._current_autograd_node()
    if node is None:
        return None
    number = node._sequence_nr()
    last = _HERE.last.get(key)
    if last is not None and last.task == task and last.node == number:
        return last.record()
    with _LOCK:
        records = [record for record in _LIVE if record.first <= number < record.end and matches(record)]
    threads = {record.thread for record in records if record.takes_part(task)}
    if not threads and _HERE.records:  # otherwise this thread belongs to PyTorch and runs backward passes only
        threads = {_HERE.number}
    records = [record for record in records if record.thread in threads or not threads]
    if not records:  # a checkpoint inside a reentrant checkpoint, which has a separate backward pass
        return None if last is None or last.running() is None else last.record()
    if len({record.thread for record in records}) > 1 and any(content(r) != content(records[0]) for r in records):
        raise RoutingError(
            "activation checkpointing recomputes layers in a backward pass through forward passes of several threads "
            "with different adapters, and the layers' adapters cannot be determined; run a separate backward pass in "
            "each thread"
        )
    innermost = max(records, key=lambda record: record.order)
    running = None if last is None or last.task != task else last.running()
    if running is None:
        running = _RunningBackward()
        torch.autograd.Variable._execution_engine.queue_callback(running)  # type: ignore[attr-defined]
    _HERE.last[key] = _Recomputation(task, number, ref(innermost), ref(running))
    return innermost


def _next_number() -> int:
    """Return the number of the next autograd node that this thread creates."""
    return torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's output, inside any nesting of mappings, sequences and dataclasses."""
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
