"""Benchmarks of an adapter, as in the evaluate stage.

    python -m flows.stages.reevaluate_benchmarks TASK.json BENCHMARKS.json

Keys of TASK.json:
    params: the parameters of the adapter's run, with the caller's section `evaluate`.
    base, adapter: folders.
    root: the repository, with the files of the tasks and the cache.

BENCHMARKS.json gets {name: identity, and figures of the adapter}. After a PeftError or PipelineError, BENCHMARKS.txt
has the message, and the exit status is 1. Progress goes to stderr.
"""

from pathlib import Path
from typing import Any

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.base.folder import check_base, load_tokenizer
from flows.base.identity import base_identity
from flows.base.model import load_for_evaluation
from flows.evaluation.benchmarks import Harness, model_digests
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import set_seed
from flows.runtime.task import run_task
from peftcore import PeftModel


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return {name: {"identity", "adapter": figures}} of the task's adapter."""
    params, base, adapter = Params.model_validate(task["params"]), Path(task["base"]), Path(task["adapter"])
    paths = Paths(Path(task["root"]))
    harness = Harness(params.evaluate.benchmarks, paths.root)
    set_seed(params.project.seed)
    check_base(base)
    model = PeftModel.from_pretrained(load_for_evaluation(base, params.quantization), adapter)
    digests = model_digests(base_identity(base), params.quantization, adapter)
    size = params.evaluate.batch_size
    figures = harness.measure(model, load_tokenizer(base), size, paths.benchmark_cache, digests)
    return {
        one.name: {"identity": one.identity(paths.root), "adapter": figures[one.name]}
        for one in params.evaluate.benchmarks
    }


if __name__ == "__main__":
    run_task(measure)
