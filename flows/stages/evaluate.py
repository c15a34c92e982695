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
from transformers import AutoConfig

from flows.base.calibrated import calibrated_identity, check_adapter, trained_base
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.heads import ranks_passages
from flows.base.identity import base_identity
from flows.base.model import load_dequantized
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
from peftcore import PeftModel
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
    checks = suite_checks(suites, paths.root)
    harness = Harness(params.evaluate.benchmarks, paths.root) if params.evaluate.benchmarks else None
    names, tokenizer = class_names(params, paths), load_tokenizer(paths.base)
    outputs = model_outputs(params, paths)
    base = trained_base(paths, params.quantization)
    check_base(base)
    check_adapter(paths.adapter, calibrated_identity(base))
    task = rows_of(params).task
    model = PeftModel.from_pretrained(load_dequantized(base, params.quantization, outputs, task), paths.adapter)
    extra: dict[str, Any] = {"control": None, "latency": None}
    if params.train.objective == "reward":
        result = evaluate_rewards(params, model, tokenizer, rows)
        return replace(result, metrics=result.metrics | extra), None, {}
    if params.train.objective in ("embedding", "reranker"):
        rows = objective_of(params).complete_rows(params, paths.base, rows)
        if params.train.objective == "embedding":
            result = evaluate_embeddings(params, model, tokenizer, rows)
        else:
            base_ranks = ranks_passages(AutoConfig.from_pretrained(paths.base, local_files_only=True))
            result = evaluate_rerankers(params, model, tokenizer, rows, base_ranks)
        return replace(result, metrics=result.metrics | extra), None, {}
    if names is not None and params.train.objective == "token_classification":
        tags = [row["labels"] for row in read_rows(paths.split("train"), ["labels"])]
        result = evaluate_tags(params, model, tokenizer, rows, names, tags)
        return replace(result, metrics=result.metrics | extra), None, {}
    if names is not None:
        train_labels = [row["label"] for row in read_rows(paths.split("train"), ["label"])]
        result = evaluate_classes(params, model, tokenizer, rows, names, train_labels)
        return replace(result, metrics=result.metrics | extra), None, {}
    if params.train.objective == "seq2seq":
        result = evaluate_sequences(params, model, tokenizer, rows)
        if params.evaluate.latency_rows:
            sources = [row["input_ids"] for row in rows[: params.evaluate.latency_rows]]
            extra["latency"] = measure_latency(model, tokenizer, sources)
        return replace(result, metrics=result.metrics | extra), None, {}
    evaluate_rows = {"chat": evaluate_chats, "unpaired_preference": evaluate_unpaired, "preference": evaluate_pairs}[
        rows_of(params).kind
    ]
    ids = "chosen_input_ids" if evaluate_rows is evaluate_pairs else "input_ids"
    result, table = evaluate_rows(params, model, tokenizer, rows), None
    if params.train.distillation.teacher is not None:
        result = with_divergence(result, params, paths, model, tokenizer, rows)
    evaluate = params.evaluate
    if evaluate.control.source is not None:
        table, extra["control"] = evaluate_control(evaluate.control, paths.root, model, tokenizer, evaluate.batch_size)
    if evaluate.latency_rows:
        prompts = [row[ids][: row["prompt_length"]] for row in rows[: evaluate.latency_rows]]
        extra["latency"] = measure_latency(model, tokenizer, prompts)
    if evaluate.calibration_rows:
        size, pad = evaluate.batch_size, padding_id(tokenizer)
        extra["calibration"] = {}
        for side, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
            with context:
                extra["calibration"][side] = token_calibration(model, rows[: evaluate.calibration_rows], pad, size)
    if evaluate.best_of_n.answers is not None:
        scorer, score = scorers[str(evaluate.best_of_n.scorer)]
        extra["best_of_n"] = measure_best_of_n(params, model, tokenizer, rows, scorer, score)
    answered = answer_suites(model, tokenizer, suites, checks, evaluate.batch_size, paths.root) if suites else {}
    if harness is not None:  # last, because the harness seeds all generators and may set the tokenizer's padding
        extra["benchmarks"] = _benchmarks(params, paths, harness, model, tokenizer)
    return replace(result, metrics=result.metrics | extra), table, answered


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
