"""Body of a process that measures one task: reads TASK.json, and writes a result or the message of a known error.

`flows.gate.reevaluation.run_process` starts such a process, as `python -m MODULE TASK.json OUTPUT`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.errors import PipelineError
from flows.runtime.processes import watch_parent
from peftcore.errors import PeftError


def write_json(result: Any, path: Path) -> None:
    """Write a result as JSON."""
    path.write_text(json.dumps(result), encoding="utf-8")


def run_task(measure: Callable[[dict[str, Any]], Any], write: Callable[[Any, Path], None] = write_json) -> None:
    """Measure the task of the command line, in a process that ends with its parent.

    After a PeftError or PipelineError, the output's name with the suffix .txt has the message, and the process exits
    with status 1.

    Args:
        measure: The measurement; its argument is the content of TASK.json.
        write: Writer of the result to the output's path.
    """
    watch_parent()
    task, output = map(Path, sys.argv[1:])
    try:
        result = measure(json.loads(task.read_text(encoding="utf-8")))
    except (PeftError, PipelineError) as error:
        output.with_suffix(".txt").write_text(str(error), encoding="utf-8")
        sys.exit(1)
    write(result, output)
