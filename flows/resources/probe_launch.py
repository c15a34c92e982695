"""The probe's process as its parent sees it. The module imports little, so that the process starts at once.

The process imports its libraries while the parent imports its own and counts, and waits for its tasks on stdin.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from flows.errors import EstimateError

if TYPE_CHECKING:
    from flows.resources.probe import Measured, Task


class Probe:
    """A started process of the probe, as a context manager that ends the process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.resources.probe_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process if it still runs, and close its pipes."""
        self._process.kill()
        self._process.communicate()

    def measure(self, tasks: "Sequence[Task]", timeout: float) -> "list[Measured]":
        """Send the tasks and return their figures. A process measures once.

        Args:
            tasks: The tasks, that of the model with fewest blocks first.
            timeout: Time limit of all tasks (seconds).

        Raises:
            EstimateError: With the process's last message, if it fails or exceeds `timeout` seconds.
        """
        from flows.resources.probe import Measured

        with TemporaryDirectory(prefix="peftcore-probe-") as folder:
            out = Path(folder) / "measured.json"
            request = {"tasks": [asdict(task) for task in tasks], "out": str(out)}
            try:
                _, said = self._process.communicate(json.dumps(request), timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise EstimateError(
                    f"the probe took longer than {timeout:g} seconds; allow more with --probe-timeout, or use "
                    "--no-probe"
                ) from error
            _check(self._process.returncode, said)
            return [Measured.of(values) for values in json.loads(out.read_text(encoding="utf-8"))]


def _check(status: int, said: str) -> None:
    """Raise EstimateError for an exit status that is not 0. said: what the process wrote to stderr."""
    if status == -9:
        raise EstimateError("the system killed the probe, probably for lack of memory; use --no-probe")
    if status:
        lines = said.strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
        raise EstimateError(f"the probe, a few steps of a shallow model, failed: {reason}")
