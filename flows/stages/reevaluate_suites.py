"""Answers of an adapter to the prompt suites of the caller, as in the evaluate stage.

    python -m flows.stages.reevaluate_suites TASK.json SUITES.json

Keys of TASK.json:
    params: the parameters of the adapter's run, with the caller's section `evaluate`.
    base, adapter: folders.
    system_prompt: the system prompt of suites that give none, or null.
    root: the repository, with the files of suites and scorers.

SUITES.json gets the content of an evaluation's suites.json. After a PeftError or PipelineError, SUITES.txt has the
message, and the exit status is 1. Progress goes to stderr.
"""

from pathlib import Path
from typing import Any

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.base.folder import check_base, load_tokenizer
from flows.base.model import load_for_evaluation
from flows.evaluation.suites.results import answer_suites, suite_checks
from flows.params import Params, load_suites
from flows.runtime.stage import set_seed
from flows.runtime.task import run_task
from peftcore import PeftModel


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the content of suites.json for the task's adapter."""
    params, base, root = Params.model_validate(task["params"]), Path(task["base"]), Path(task["root"])
    suites = load_suites(params.evaluate, task["system_prompt"], root)
    checks = suite_checks(suites, root)
    set_seed(params.project.seed)
    check_base(base)
    model = PeftModel.from_pretrained(load_for_evaluation(base, params.quantization), task["adapter"])
    return answer_suites(model, load_tokenizer(base), suites, checks, params.evaluate.batch_size, root)


if __name__ == "__main__":
    run_task(measure)
