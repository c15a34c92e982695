"""Groups of processes on one machine (gloo, CPU) that do the same work, for tests; and what they send each other.

The processes are forked from a server that has imported everything once, which takes a tenth of starting them anew.
"""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

PROCESSES = 2
SECONDS = 120
"""After which a collective gives up: the machine may be busy with others' work."""

multiprocessing.set_forkserver_preload(["process_facts"])


class CountedGroup(dist.ProcessGroup):
    """gloo, with the bytes that this process gave to each collective."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.sent: list[tuple[str, int]] = []
        """(collective, bytes)"""

    def getBackendName(self) -> str:
        return "counted"

    def _counted(self, collective: str, tensors: list[Tensor]) -> None:
        self.sent.append((collective, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        self._counted("allreduce", tensors)
        return self._gloo.allreduce(tensors, opts or dist.AllreduceOptions())

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        self._counted("broadcast", tensors)
        return self._gloo.broadcast(tensors, opts or dist.BroadcastOptions())

    def allgather(self, outputs: Any, tensors: list[Tensor], opts: Any = None) -> Any:
        self._counted("allgather", tensors)
        return self._gloo.allgather(outputs, tensors, opts or dist.AllgatherOptions())

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        self._counted("allgather", [tensor])
        return self._gloo._allgather_base(output, tensor, opts or dist.AllgatherOptions())

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(opts or dist.BarrierOptions())


def group() -> CountedGroup:
    """The group of this process."""
    found = dist.group.WORLD
    assert isinstance(found, CountedGroup)
    return found


@contextmanager
def fresh_state() -> Iterator[None]:
    """What accelerate remembers of the process is forgotten, before and after."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def together(work: Callable[[Path], Any], folder: Path, backend: str = "counted") -> list[Any]:
    """What `work(folder)` gives in each process of a group, by rank; a failure of one is raised here."""
    folder.mkdir(exist_ok=True)
    _start_server()
    mp.start_processes(_process, (work, str(folder), backend), nprocs=PROCESSES, start_method="forkserver")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def _start_server() -> None:
    """Start the server unless it runs; it finds what it is to import by the environment only, not by our sys.path."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        forkserver.ensure_running()


def _process(rank: int, work: Callable[[Path], Any], folder: str, backend: str) -> None:
    gc.freeze()  # or each training would look through, and copy, all that the server has imported
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    torch.set_num_threads(1)
    dist.Backend.register_backend("counted", CountedGroup, devices=["cpu"])
    timeout = timedelta(seconds=SECONDS)
    method = f"file://{folder}/group"
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=PROCESSES, timeout=timeout)
    with fresh_state():
        torch.save(work(Path(folder)), Path(folder) / f"result_{rank}.pt")
    dist.barrier()
    os._exit(0)  # taking gloo and FSDP's modules apart in an exiting process can hang


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
