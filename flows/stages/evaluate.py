"""evaluate: metrics of the base and the adapter on the same test rows, for the objective of `train.objective`.

Both are computed on the weights that training saw, dequantised once, with the adapter enabled and disabled. All kinds
of rows share one layout of results; metrics that do not apply are left out. A generative model is also measured for
forgetting on the control set and for latency. The scorers of `evaluate.scorers` add columns and figures,
and so do the rewards of `train.grpo.rewards` and their weighted sum, `reward`.
The adapter answers the prompts of `evaluate.suites`. lm-evaluation-harness measures base and adapter on the tasks of
`evaluate.benchmarks`.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from transformers import AutoConfig, PreTrainedTokenizerBase

from flows.base.calibrated import calibrated_identity, check_adapter, trained_base
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.heads import ranks_passages
from flows.base.identity import base_identity
from flows.base.model import load_for_evaluation
from flows.data.rows import Row, read_rows
from flows.errors import StageError
from flows.evaluation.benchmarks import Harness, model_digests
from flows.evaluation.best_of_n import measure_best_of_n
from flows.evaluation.calibration import token_calibration
from flows.evaluation.chats import evaluate_chats
from flows.evaluation.classes import evaluate_classes
from flows.evaluation.control import evaluate_control
from flows.evaluation.divergence import with_divergence
from flows.evaluation.embeddings import evaluate_embeddings
from flows.evaluation.latency import measure_latency
from flows.evaluation.pairs import evaluate_pairs
from flows.evaluation.rerankers import evaluate_rerankers
from flows.evaluation.result import EvaluationResult
from flows.evaluation.rewards import evaluate_rewards
from flows.evaluation.scorers.rewards import load_scorers
from flows.evaluation.scorers.scores import with_scores
from flows.evaluation.scorers.texts import Score
from flows.evaluation.sequences import evaluate_sequences
from flows.evaluation.suites.results import answer_suites, suite_checks
from flows.evaluation.tags import evaluate_tags
from flows.evaluation.unpaired import evaluate_unpaired
from flows.params import Params, Scorer, Suite, load_suites
from flows.paths import Paths
from flows.runtime.stage import start
from flows.training.objectives import check_split, class_names, loss_function, model_outputs, objective_of, rows_of
from flows.verdicts import IDENTITY, suite_figures
from peftcore import PeftModel, TaskType
from peftcore.files import directory_written_atomically, sha256, write_atomically


def run(params: Params, paths: Paths) -> None:
    """Evaluate; writes the rows, the metrics and a table of samples."""
    manifest = check_base(paths.base)
    check_split(params, paths.split("test"))
    rows = read_rows(paths.split("test"), limit=params.evaluate.rows)
    if not any(row.get("weight", 1.0) for row in rows):
        raise StageError(
            f"all {len(rows)} test rows to evaluate have weight 0, so there is no test loss; give some of them a "
            "weight above 0, or a larger evaluate.rows"
        )
    scorers = load_scorers(params.scorers, paths.root)
    suites = load_suites(params.evaluate, params.data.system_prompt, paths.root)
    result, control, answered = _evaluate(params, paths, rows, suites, scorers)
    result = with_scores(result, scorers, rows, paths.root)
    context: dict[str, Any] = {"objective": params.train.objective, "loss_function": loss_function(params)}
    context |= {
        "evaluation_set": sha256(paths.split("test")),
        "base_model": base_identity(paths.base),
        "base_manifest": manifest,
    }
    if (calibrated := calibrated_identity(trained_base(paths, params.quantization))) is not None:
        context["calibrated_base"] = calibrated
    metrics = result.metrics | context
    if answered:
        metrics["suites"] = {
            name: suite_figures(one) | {key: one[key] for key in IDENTITY} for name, one in answered.items()
        }
    with directory_written_atomically(paths.evaluation) as folder:
        parquet.write_table(result.table, folder / paths.evaluation_rows.name)
        if control is not None:
            parquet.write_table(control, folder / paths.evaluation_control.name)
        contents: dict[Path, Any] = {paths.evaluation_metrics: metrics, paths.samples: result.samples}
        if answered:
            contents[paths.evaluation_suites] = answered
        for path, content in contents.items():
            write_atomically(folder / path.name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _evaluate(
    params: Params,
    paths: Paths,
    rows: list[Row],
    suites: Mapping[str, Suite],
    scorers: Mapping[str, tuple[Scorer, Score]],
) -> tuple[EvaluationResult, pa.Table | None, dict[str, Any]]:
    """Return the result, the table of the control set, and the content of suites.json, which is empty without suites.

    The result's metrics "control" and "latency" are None if they were not measured.
    """
    evaluate = params.evaluate
    checks = suite_checks(suites, paths.root)
    harness = Harness(evaluate.benchmarks, paths.root) if evaluate.benchmarks else None
    tokenizer = load_tokenizer(paths.base)
    model = _load_model(params, paths)
    result = _objective_result(params, paths, model, tokenizer, rows)
    control, answered = None, {}
    extra: dict[str, Any] = {"control": None, "latency": None}
    task = rows_of(params).task
    if task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and evaluate.latency_rows:
        extra["latency"] = measure_latency(model, tokenizer, _prompts(params, rows[: evaluate.latency_rows]))
    if task is TaskType.CAUSAL_LM:
        if params.train.distillation.teacher is not None:
            result = with_divergence(result, params, paths, model, tokenizer, rows)
        if evaluate.control.source is not None:
            control, extra["control"] = evaluate_control(
                evaluate.control, paths.root, model, tokenizer, evaluate.batch_size
            )
        if evaluate.calibration_rows:
            extra["calibration"] = _calibration(params, model, tokenizer, rows[: evaluate.calibration_rows])
        if evaluate.best_of_n.answers is not None:
            scorer, score = scorers[str(evaluate.best_of_n.scorer)]
            extra["best_of_n"] = measure_best_of_n(params, model, tokenizer, rows, scorer, score)
        if suites:
            answered = answer_suites(model, tokenizer, suites, checks, evaluate.batch_size, paths.root)
        if harness is not None:  # last, because the harness seeds all generators and may set the tokenizer's padding
            extra["benchmarks"] = _benchmarks(params, paths, harness, model, tokenizer)
    return replace(result, metrics=result.metrics | extra), control, answered


def _load_model(params: Params, paths: Paths) -> Any:
    """Return the dequantised base with the trained adapter, after checks of both."""
    outputs = model_outputs(params, paths)
    base = trained_base(paths, params.quantization)
    check_base(base)
    check_adapter(paths.adapter, calibrated_identity(base))
    loaded = load_for_evaluation(base, params.quantization, outputs, rows_of(params).task)
    return PeftModel.from_pretrained(loaded, paths.adapter)


def _objective_result(
    params: Params, paths: Paths, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> EvaluationResult:
    """Return the metrics of the objective, its table of rows, and samples."""
    objective, arguments = params.train.objective, (params, model, tokenizer)
    if objective == "reward":
        return evaluate_rewards(*arguments, rows)
    if objective == "seq2seq":
        return evaluate_sequences(*arguments, rows)
    if objective in ("embedding", "reranker"):
        rows = objective_of(params).complete_rows(params, paths.base, rows)
        if objective == "embedding":
            return evaluate_embeddings(*arguments, rows)
        base_ranks = ranks_passages(AutoConfig.from_pretrained(paths.base, local_files_only=True))
        return evaluate_rerankers(*arguments, rows, base_ranks)
    names = class_names(params, paths)
    if names is not None and objective == "classification":
        labels = [row["label"] for row in read_rows(paths.split("train"), ["label"])]
        return evaluate_classes(*arguments, rows, names, labels)
    if names is not None:
        tags = [row["labels"] for row in read_rows(paths.split("train"), ["labels"])]
        return evaluate_tags(*arguments, rows, names, tags)
    evaluate_rows = {"chat": evaluate_chats, "unpaired_preference": evaluate_unpaired, "preference": evaluate_pairs}[
        rows_of(params).kind
    ]
    return evaluate_rows(*arguments, rows)


def _prompts(params: Params, rows: list[Row]) -> list[list[int]]:
    """Return the token ids of the rows' prompts; for an encoder-decoder, of its sources."""
    if rows_of(params).task is TaskType.SEQ_2_SEQ_LM:
        return [row["input_ids"] for row in rows]
    ids = "chosen_input_ids" if rows_of(params).kind == "preference" else "input_ids"
    return [row[ids][: row["prompt_length"]] for row in rows]


def _calibration(params: Params, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, Any]:
    """Return the calibration of base and adapter: {"base", "adapter"} -> figures."""
    figures = {}
    for side, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
        with context:
            figures[side] = token_calibration(model, rows, padding_id(tokenizer), params.evaluate.batch_size)
    return figures


def _benchmarks(params: Params, paths: Paths, harness: Harness, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the metric "benchmarks": {name: {"identity", "base": figures, "adapter": figures}}."""
    sides = {"base": (None, model.disable_adapter()), "adapter": (paths.adapter, nullcontext())}
    figures = {}
    for side, (adapter, context) in sides.items():
        digests = model_digests(base_identity(trained_base(paths, params.quantization)), params.quantization, adapter)
        with context:
            size = params.evaluate.batch_size
            figures[side] = harness.measure(model, tokenizer, size, paths.benchmark_cache, digests)
    return {
        one.name: {"identity": one.identity(paths.root)} | {side: figures[side][one.name] for side in sides}
        for one in params.evaluate.benchmarks
    }


if __name__ == "__main__":
    start(run)
