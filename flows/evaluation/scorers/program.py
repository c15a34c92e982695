"""Built-in scorer of answers that are Python programs: each one runs in a process with limits.

The limits stop accidents, such as endless loops and large allocations. They are no sandbox: the program can read files
and use the network as the user who runs the evaluation. Use a container for models that you do not trust.
"""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows.evaluation.scorers.texts import Score, unfenced
from flows.runtime.processes import die_with_parent

LARGEST_FILE = 16 << 20
"""Maximum size of a file that a program writes (bytes)."""
COMPLETED = 93
"""Exit status after the last line of a program, so that an early exit does not count as success."""
START = """\
import os, resource, runpy, sys
memory, seconds, size, has_tests = map(int, sys.argv[1:])
for what, most in (("AS", memory), ("CPU", seconds), ("FSIZE", size), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
try:
    runpy.run_path("program.py", run_name="program" if has_tests else "__main__")
except SystemExit as end:
    if has_tests or end.code not in (None, 0):
        raise
sys.stdout.flush()
os._exit({completed})
""".replace("{completed}", str(COMPLETED))
"""The process's own code: it sets the limits, and then runs the program."""


def code(*, tests: str | None = None, seconds: float = 5.0, memory_mb: int = 1024) -> Score:
    """Return a scorer: 1 if the answer, or its first fenced block, runs to its end without an error, else 0.

    Args:
        tests: The column of the row with statements that run after the answer, such as `assert add(1, 2) == 3`;
            "reference" takes the reference answer. None: the answer alone has to run.
        seconds: Maximum time of a program.
        memory_mb: Maximum memory of a program (2^20 bytes of address space).
    """
    if seconds <= 0 or memory_mb < 64:
        raise ValueError(f"seconds is {seconds:g} and memory_mb {memory_mb}; give more than 0, and at least 64")

    def score(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        program = unfenced(answer)
        if tests is not None:
            columns = row | {"reference": reference}
            if not isinstance(columns.get(tests), str):
                raise KeyError(f"the row has no text in column {tests}; name it in data.extra_columns")
            program = f"{program}\n\n{columns[tests]}\n"
        return float(runs(program, seconds, memory_mb << 20, tests is not None))

    return score


def runs(program: str, seconds: float, memory: int, has_tests: bool) -> bool:
    """Run a program in an empty folder; return True if it reaches its end within the limits.

    Args:
        program: Source code.
        seconds: Maximum wall-clock time.
        memory: Maximum address space (bytes).
        has_tests: True if the program ends with tests, which an early exit would skip.
    """
    with TemporaryDirectory(prefix="peftcore-code-") as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        limits = (memory, math.ceil(seconds) + 1, LARGEST_FILE, int(has_tests))
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", START, *map(str, limits)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            return process.wait(seconds) == COMPLETED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and those that it started, and wait for the process."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the group has ended, and the process was waited for
    finally:
        process.wait()
