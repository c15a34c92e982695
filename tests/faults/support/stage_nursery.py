"""Stages in processes of their own, which a test may end: one parent imports everything and forks each stage.

A stage gets a process group of its own, as a terminal gives a command, so that a signal to the group reaches what it
has started as well.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
HEAVY = ("fetch", "prepare", "detect", "train", "evaluate", "merge", "register")


class Nursery:
    """The parent; one stage at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        assert self._answer() == "ready"

    def start(self, root: Path, stage: str) -> int:
        """Begin a stage in a repository; returns its process id, which is its group's too. stderr: `said` below."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(root), stage]) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """The exit status of the stage, negative for a signal."""
        return int(self._answer())

    def run(self, root: Path, stage: str) -> tuple[int, float]:
        """A whole stage; its exit status and seconds."""
        began = time.monotonic()
        self.start(root, stage)
        return self.wait(), time.monotonic() - began

    def end(self, root: Path, stage: str, number: signal.Signals, after: float) -> int:
        """Send a signal to the group of a stage `after` seconds from its start; its exit status."""
        group = self.start(root, stage)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(group, number)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def said(root: Path) -> str:
    """What the last stage in a repository wrote to stdout and stderr."""
    return root.with_name(f"{root.name}.said").read_text()


def serve() -> None:
    """Read [root, stage] lines; answer with the process id, then with the status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    modules: dict[str, Any] = {name: importlib.import_module(f"flows.stages.{name}") for name in HEAVY}
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  imported late otherwise

    torch.set_num_threads(1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        root, stage = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(Path(root), modules[stage], answers)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _become(root: Path, module: Any, answers: Any) -> None:
    from flows.runtime.stage import start

    status = 70
    try:
        os.setsid()
        os.chdir(root)
        log = os.open(root.with_name(f"{root.name}.said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
        print(os.getpid(), file=answers, flush=True)
        start(module.run)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
