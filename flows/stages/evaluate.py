"""Judge the base and the adapter on the same test rows, as `train.objective` has it.

Both are computed on the weights that training saw, dequantised once, with the adapter switched on and off. What is
written is laid out alike whatever the rows are; a figure that a kind of row does not have is left out. A model that
writes is also read for forgetting on the control set and timed, which a classifier is not.
"""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from flows.base.identity import base_identity
from flows.base.model import check_base, load_dequantized, load_tokenizer
from flows.data.rows import Row, read_rows
from flows.evaluation.chats import judge_chats
from flows.evaluation.classes import judge_classes
from flows.evaluation.control import judge_control
from flows.evaluation.latency import measure_latency
from flows.evaluation.pairs import judge_pairs
from flows.evaluation.result import Judgement
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import start
from flows.training.objectives import check_split, class_names, loss_function
from peftcore import PeftModel
from peftcore.files import directory_written_atomically, sha256, write_atomically


def run(params: Params, paths: Paths) -> None:
    """Evaluate; writes the rows, the metrics and a table of samples."""
    manifest = check_base(paths.base)
    check_split(params, paths.split("test"))
    rows = read_rows(paths.split("test"), limit=params.evaluate.rows)
    judgement, control = _judged(params, paths, rows)
    told: dict[str, Any] = {"objective": params.train.objective, "loss_function": loss_function(params)}
    told |= {
        "evaluation_set": sha256(paths.split("test")),
        "base_model": base_identity(paths.base),
        "base_manifest": manifest,
    }
    metrics = judgement.metrics | told
    with directory_written_atomically(paths.evaluation) as folder:
        parquet.write_table(judgement.table, folder / paths.evaluation_rows.name)
        if control is not None:
            parquet.write_table(control, folder / paths.evaluation_control.name)
        for name, content in ((paths.evaluation_metrics.name, metrics), (paths.samples.name, judgement.samples)):
            write_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _judged(params: Params, paths: Paths, rows: list[Row]) -> tuple[Judgement, pa.Table | None]:
    """What the rows come to, with the figures "control" and "latency" (None: not measured), and the control table."""
    names, tokenizer = class_names(params, paths), load_tokenizer(paths.base)
    model = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, names), paths.adapter)
    found: dict[str, Any] = {"control": None, "latency": None}
    if names is not None:
        train_labels = [row["label"] for row in read_rows(paths.split("train"), ["label"])]
        judgement = judge_classes(params, model, tokenizer, rows, names, train_labels)
        return replace(judgement, metrics=judgement.metrics | found), None
    judge, ids = (judge_chats, "input_ids") if params.train.objective == "sft" else (judge_pairs, "chosen_input_ids")
    judgement, table = judge(params, model, tokenizer, rows), None
    evaluate = params.evaluate
    if evaluate.control.source is not None:
        table, found["control"] = judge_control(evaluate.control, paths.root, model, tokenizer, evaluate.batch_size)
    if evaluate.latency_rows:
        prompts = [row[ids][: row["prompt_length"]] for row in rows[: evaluate.latency_rows]]
        found["latency"] = measure_latency(model, tokenizer, prompts)
    return replace(judgement, metrics=judgement.metrics | found), table


if __name__ == "__main__":
    start(run)
