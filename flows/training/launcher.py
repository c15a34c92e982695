"""Training in several processes, on one machine or more: the stage starts itself in each process and waits for all.

The stage that DVC started runs the launcher's agent, so the processes are its children and end with it. An error of a
process reaches the agent's message once; only the main process shows progress and writes results.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flows.errors import PipelineError, StageError
from flows.runtime.stage import is_disk_full
from flows.training.nodes import ADDRESS, Node
from peftcore.errors import PeftError
from peftcore.files import write_atomically

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file in which torch's agent expects a process's error."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")
"""Messages of a collective operation in a process whose peer has died."""


def is_launched() -> bool:
    """Return True if a launcher started this process."""
    return torch.distributed.is_torchelastic_launched()


# -- starting ----------------------------------------------------------------------------------------------------------


def launch(module: str, processes: int, launcher: str, node: Node | None = None) -> None:
    """Run `python -m module` in several processes, by accelerate or torchrun, and wait for all.

    Each process gets an equal share of the cores for its threads, and one GPU if there are GPUs.

    Args:
        module: Module to run.
        processes: Processes of this machine.
        launcher: accelerate or torchrun.
        node: This machine, if there are several; each starts the same number of processes.

    Raises:
        StageError: Names the process that failed; the others are then stopped.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise StageError(
            f"train.processes is {processes}, and this machine has {torch.cuda.device_count()} GPUs: give at most as "
            "many processes, because each trains on one"
        )
    # the agent's own report of a failure is a page long; our message has its content
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with _environment(processes, node):
        try:
            _LAUNCHERS[launcher](module, processes, node)
        except ChildFailedError as error:
            raise StageError(_failure_message(error.failures, processes * (node.nodes if node else 1))) from None
        except (torch.distributed.DistError, ConnectionError) as error:
            if node is None:
                raise
            raise StageError(
                f"node {node.rank} of {node.nodes} did not meet the others at {node.host}:{node.port} ({error}); start "
                f"all of them, and check that {ADDRESS} names node 0 and that its port can be reached"
            ) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + int(error.sigval))


def _by_torchrun(module: str, processes: int, node: Node | None) -> None:
    from torch.distributed import run

    address = ["--standalone", "--local-addr=127.0.0.1"]
    if node is not None:
        address = [f"--nnodes={node.nodes}", f"--node-rank={node.rank}"]
        address += [f"--master-addr={node.host}", f"--master-port={node.port}"]
    run.run(run.get_args_parser().parse_args([*address, f"--nproc-per-node={processes}", "--module", module]))


def _by_accelerate(module: str, processes: int, node: Node | None) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    values: dict[str, Any] = {"num_processes": processes, "num_machines": 1, "main_process_port": 0}
    if node is not None:
        values = {"num_processes": processes * node.nodes, "num_machines": node.nodes, "machine_rank": node.rank}
        values |= {"main_process_ip": node.host, "main_process_port": node.port}
    values |= {"mixed_precision": "no", "dynamo_backend": "no", "num_cpu_threads_per_process": _threads(processes)}
    options = [f"--{name}={value}" for name, value in values.items()]
    # --multi_gpu starts several processes on CPUs as well; --cpu starts only one
    launch_command(launch_command_parser().parse_args(["--multi_gpu", *options, "--module", module]))


Launcher = Callable[[str, int, Node | None], None]
_LAUNCHERS: dict[str, Launcher] = {"accelerate": _by_accelerate, "torchrun": _by_torchrun}


@contextmanager
def _environment(processes: int, node: Node | None) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(_threads(processes))
    if sys.platform == "linux" and (node is None or node.is_local):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine may not resolve its own name
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _threads(processes: int) -> int:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return int(threads) if threads.isdecimal() else max(1, cores // processes)


def _failure_message(failures: dict[int, ProcessFailure], processes: int) -> str:
    """Return the message about the process that failed first, with advice."""
    rank, failure = min(failures.items(), key=_order)
    content: Any = failure.message
    if isinstance(content, dict):
        return content["message"]
    if failure.exitcode < 0:
        return (
            f"process {rank} of {processes} (pid {failure.pid}) was killed by {failure.signal_name()}, and the others "
            "were stopped; if the machine was out of memory, lower train.processes or train.batch_size. Run it again: "
            "training resumes from the last complete checkpoint"
        )
    return (
        f"process {rank} of {processes} (pid {failure.pid}) ended with status {failure.exitcode}; its own message is "
        "above. Run it again: training resumes from the last complete checkpoint"
    )


def _order(one: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
    """Return the sort key of a failure: killed processes first, then errors, then processes that lost a peer."""
    rank, failure = one
    content: Any = failure.message
    killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # the agent stops the others by SIGTERM
    lost = isinstance(content, dict) and content["extraInfo"]["lost"]
    return (0 if killed else 2 if lost or failure.exitcode == 128 + signal.SIGTERM else 1), failure.timestamp, rank


# -- in each process ---------------------------------------------------------------------------------------------------


@contextmanager
def joined(processes: int) -> Iterator[PartialState]:
    """Join the group of processes; yields its state.

    The launcher reports errors of the body, once.

    Raises:
        StageError: The group has another size than `processes`.
    """
    if not is_launched():
        yield PartialState(cpu=not torch.cuda.is_available())
        return
    try:
        state = PartialState(cpu=not torch.cuda.is_available())
        if state.num_processes != processes:
            raise StageError(
                f"the launcher started {state.num_processes} processes, but train.processes * train.nodes is "
                f"{processes}; make both equal"
            )
        if not state.is_main_process:
            for package in ("flows", "peftcore"):
                logging.getLogger(package).setLevel(logging.ERROR)
        yield state
        state.wait_for_everyone()
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT)
    except (PeftError, PipelineError) as error:
        _leave(str(error))
    except Exception as error:
        if is_disk_full(error):
            _leave(f"the disk is full ({error}); free some space and run it again; earlier outputs are intact")
        if any(sign in str(error) for sign in _LOST):
            _leave(f"a process lost another ({error}); run it again: training resumes from the last checkpoint", True)
        raise
    torch.distributed.destroy_process_group()


def _leave(message: str, lost: bool = False) -> NoReturn:
    """End this process with status 1; the launcher reports the message."""
    extra = {"py_callstack": "", "timestamp": str(int(time.time())), "lost": lost}
    file = os.environ.get(_ERROR_FILE)
    if file is not None:
        # atomic, because the agent may kill this process meanwhile and reads the file
        write_atomically(Path(file), json.dumps({"message": {"message": message, "extraInfo": extra}}))
    _exit(1)


def _exit(status: int) -> NoReturn:
    # the launcher now stops every process; SIGTERM during the interpreter's exit must not raise an exception
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)
