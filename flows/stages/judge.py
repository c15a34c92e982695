"""Verdicts of the judge on answers of candidate and champion, in a process of its own.

    python -m flows.stages.judge TASK.json VERDICTS.json

Keys of TASK.json:
    judge: the section `gate.judge` of the caller.
    pairs: mappings with id, prompt, reference, candidate and champion.
    cache: the folder of the cache.
    root: the repository, with the judge's file.

VERDICTS.json gets the result of `judge_pairs`. After a PipelineError, VERDICTS.txt has the message, and the exit status
is 1. Progress goes to stderr.
"""

from pathlib import Path
from typing import Any

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.evaluation.judge import judge_pairs
from flows.params import Judge
from flows.runtime.task import run_task


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the verdicts on the task's pairs."""
    judge = Judge.model_validate(task["judge"])
    return judge_pairs(judge, task["pairs"], Path(task["cache"]), Path(task["root"]))


if __name__ == "__main__":
    run_task(measure)
