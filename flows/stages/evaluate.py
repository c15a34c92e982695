"""evaluate: metrics of the base and the adapter on the same test rows, for the objective of `train.objective`.

Both are computed on the weights that training saw, dequantised once, with the adapter enabled and disabled. All kinds
of rows share one layout of results; metrics that do not apply are left out. A generative model is also measured for
forgetting on the control set and for latency. The scorers of `evaluate.scorers` add columns and figures.
"""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from flows.base.identity import base_identity
from flows.base.model import check_base, load_dequantized, load_tokenizer
from flows.data.rows import Row, read_rows
from flows.evaluation.chats import evaluate_chats
from flows.evaluation.classes import evaluate_classes
from flows.evaluation.control import evaluate_control
from flows.evaluation.divergence import with_divergence
from flows.evaluation.latency import measure_latency
from flows.evaluation.pairs import evaluate_pairs
from flows.evaluation.result import EvaluationResult
from flows.evaluation.scorers.load import load_scorer
from flows.evaluation.scorers.scores import with_scores
from flows.evaluation.unpaired import evaluate_unpaired
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import start
from flows.training.objectives import check_split, class_names, loss_function, rows_of
from peftcore import PeftModel
from peftcore.files import directory_written_atomically, sha256, write_atomically


def run(params: Params, paths: Paths) -> None:
    """Evaluate; writes the rows, the metrics and a table of samples."""
    manifest = check_base(paths.base)
    check_split(params, paths.split("test"))
    rows = read_rows(paths.split("test"), limit=params.evaluate.rows)
    scorers = {scorer.name: (scorer, load_scorer(scorer, paths.root)) for scorer in params.evaluate.scorers}
    result, control = _evaluate(params, paths, rows)
    result = with_scores(result, scorers, rows, paths.root)
    context: dict[str, Any] = {"objective": params.train.objective, "loss_function": loss_function(params)}
    context |= {
        "evaluation_set": sha256(paths.split("test")),
        "base_model": base_identity(paths.base),
        "base_manifest": manifest,
    }
    metrics = result.metrics | context
    with directory_written_atomically(paths.evaluation) as folder:
        parquet.write_table(result.table, folder / paths.evaluation_rows.name)
        if control is not None:
            parquet.write_table(control, folder / paths.evaluation_control.name)
        for name, content in ((paths.evaluation_metrics.name, metrics), (paths.samples.name, result.samples)):
            write_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _evaluate(params: Params, paths: Paths, rows: list[Row]) -> tuple[EvaluationResult, pa.Table | None]:
    """Return the result with the metrics "control" and "latency" (None: not measured), and the control table."""
    names, tokenizer = class_names(params, paths), load_tokenizer(paths.base)
    model = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, names), paths.adapter)
    extra: dict[str, Any] = {"control": None, "latency": None}
    if names is not None:
        train_labels = [row["label"] for row in read_rows(paths.split("train"), ["label"])]
        result = evaluate_classes(params, model, tokenizer, rows, names, train_labels)
        return replace(result, metrics=result.metrics | extra), None
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
    return replace(result, metrics=result.metrics | extra), table


if __name__ == "__main__":
    start(run)
