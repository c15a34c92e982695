"""Benchmarks by lm-evaluation-harness on the live model, with its adapter enabled or disabled; no merged copy is made.

The harness computes the figures and their standard errors, as `lm_eval --model hf --model_args pretrained=...,peft=...`
does. Results are cached by the digests of base and adapter, so that an unchanged model is measured once.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flows.base.hub import run_downloader
from flows.errors import StageError
from flows.params import Benchmark, Quantization
from flows.params.file import suggest
from peftcore.errors import require_extra
from peftcore.files import MANIFEST, sha256, write_atomically

logger = logging.getLogger(__name__)

_DOWNLOAD = """
import sys
from lm_eval.tasks import TaskManager
task, defaults = sys.argv[1:]
TaskManager(include_defaults=bool(defaults)).load([task])
"""

Figures = dict[str, Any]
"""A benchmark of one model: {"value", "stderr" (None: the harness gives none), "metric", "higher", "rows"}."""


def check_benchmarks(benchmarks: Sequence[Benchmark], root: Path) -> None:
    """Check, without importing the harness, that it is installed and that the files of tasks exist.

    Args:
        benchmarks: The entries of `evaluate.benchmarks`.
        root: The repository.

    Raises:
        MissingExtraError: The harness is not installed.
        StageError: A file is missing.
    """
    if benchmarks:
        require_extra("benchmarks", "evaluate.benchmarks", "lm_eval")
    for benchmark in benchmarks:
        if benchmark.is_file and not (root / benchmark.task).is_file():
            raise StageError(
                f"evaluate.benchmarks, {benchmark.task}: the file cannot be read; create it and `git add` it"
            )


class Harness:
    """The tasks of the harness that a run measures, loaded before the model is.

    Args:
        benchmarks: The entries of `evaluate.benchmarks`.
        root: The repository.

    Raises:
        MissingExtraError: The harness is not installed.
        StageError: A task or its data cannot be found.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], root: Path) -> None:
        check_benchmarks(benchmarks, root)
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        self.version: str = lm_eval.__version__
        self._root = root
        self._benchmarks = benchmarks
        # the index of all tasks of the harness takes seconds, and files do not need it
        self._tasks = TaskManager(include_defaults=not all(one.is_file for one in benchmarks))
        for benchmark in benchmarks:
            self._load(benchmark)

    def _load(self, benchmark: Benchmark) -> None:
        """Load a task and its data, to find mistakes early."""
        at = f"evaluate.benchmarks, {benchmark.task}"
        if not benchmark.is_file and benchmark.task not in self._tasks.all_tasks:
            near = suggest(benchmark.task, list(self._tasks.all_tasks), "")
            known = near if near.startswith("did you") else "`lm_eval ls tasks` lists all tasks"
            raise StageError(f"{at}: the harness has no such task; {known}, or give data/FILE.yaml")
        spec = self._spec(benchmark)
        try:
            with contextlib.chdir(self._root):
                try:
                    self._tasks.load([spec])
                except ConnectionError:  # its data lie on the hub, and are not cached; a stage is offline
                    logger.info("downloading the data of the benchmark %s", benchmark.name)
                    run_downloader("-c", _DOWNLOAD, spec, "" if benchmark.is_file else "with the harness's own")
                    self._tasks.load([spec])
        except Exception as error:  # of the harness, of datasets, of the hub, or of code in the task's YAML
            raise StageError(
                f"{at}: the task or its data cannot be loaded ({type(error).__name__}: {str(error)[:300]}); run it "
                "once where the network reaches the data, so that they are cached, or give data/FILE.yaml with files "
                "of your own (dataset_path: json)"
            ) from error

    def _spec(self, benchmark: Benchmark) -> str:
        return str(self._root.absolute() / benchmark.task) if benchmark.is_file else benchmark.task

    def measure(
        self, model: Any, tokenizer: Any, batch_size: int, cache: Path, digests: Mapping[str, Any]
    ) -> dict[str, Figures]:
        """Return {name of a benchmark: its figures} of a model.

        Args:
            model: A causal language model in the state to measure.
            tokenizer: Its tokenizer.
            batch_size: Requests per forward pass.
            cache: Folder of cached results.
            digests: Values that identify the model's weights: of the base, its storage, and the adapter.

        Raises:
            StageError: A task has no such metric.
        """
        figures, language_model = {}, None
        for benchmark in self._benchmarks:
            key = {**digests, "benchmark": benchmark.identity(self._root), "lm_eval": self.version, "batch": batch_size}
            digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
            path = cache / f"{digest}.json"
            if not path.exists():
                language_model = language_model or self._language_model(model, tokenizer, batch_size)
                cache.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(self._evaluate(benchmark, language_model), indent=2) + "\n")
            figures[benchmark.name] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def _language_model(self, model: Any, tokenizer: Any, batch_size: int) -> Any:
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that the model is not given by its name
        try:
            return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        finally:
            logger.setLevel(level)

    def _evaluate(self, benchmark: Benchmark, language_model: Any) -> Figures:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

        with contextlib.chdir(self._root):
            results = simple_evaluate(
                model=language_model,
                tasks=[self._spec(benchmark)],
                num_fewshot=benchmark.num_fewshot,
                limit=benchmark.limit,
                task_manager=self._tasks,
                log_samples=False,
            )
        return _figures(benchmark, cast(Mapping[str, Any], results))


def model_digests(base: str, quantization: Quantization, adapter: Path | None) -> dict[str, Any]:
    """Return the digests that identify a model's weights.

    Args:
        base: The base's identity.
        quantization: The storage of the base's weights.
        adapter: The adapter's folder; None if the adapter is disabled.
    """
    content = None if adapter is None else sha256(adapter / MANIFEST)
    return {"base": base, "quantization": quantization.model_dump(), "adapter": content}


def _figures(benchmark: Benchmark, results: Mapping[str, Any]) -> Figures:
    """Return the figures of one benchmark from the harness's results."""
    names = list(results.get("groups") or results["results"])
    name = benchmark.task if benchmark.task in names else names[0]
    values = results["results"][name] | (results.get("groups") or {}).get(name, {})
    # "METRIC,FILTER": value, and "METRIC_stderr,FILTER": standard error or "N/A"
    metrics = [key for key in values if "," in key and "_stderr," not in key]
    wanted = [key for key in metrics if benchmark.metric in (None, key, key.partition(",")[0])]
    if not wanted:
        known = ", ".join(metrics) or "none; name its tasks instead"
        raise StageError(f"evaluate.benchmarks, {benchmark.task}: no metric {benchmark.metric or ''}; it has {known}")
    metric, _, kind = wanted[0].partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    samples = results.get("n-samples", {})
    rows = [samples[one]["effective"] for one in samples if one == name or name not in samples]
    return {
        "metric": wanted[0],
        "value": float(values[wanted[0]]),
        "stderr": float(error) if isinstance(error, int | float) else None,
        "higher": bool(results.get("higher_is_better", {}).get(name, {}).get(metric, True)),
        "rows": sum(rows),
    }
