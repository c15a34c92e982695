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

import json
import sys
from pathlib import Path

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.errors import PipelineError
from flows.evaluation.judge import judge_pairs
from flows.params import Judge
from flows.runtime.processes import watch_parent


def main() -> None:
    """Judge the pairs of the task file, and write the verdicts or the message of a known error."""
    watch_parent()
    request, output = map(Path, sys.argv[1:])
    task = json.loads(request.read_text())
    try:
        judge = Judge.model_validate(task["judge"])
        verdicts = judge_pairs(judge, task["pairs"], Path(task["cache"]), Path(task["root"]))
    except PipelineError as error:
        output.with_suffix(".txt").write_text(str(error))
        sys.exit(1)
    output.write_text(json.dumps(verdicts))


if __name__ == "__main__":
    main()
