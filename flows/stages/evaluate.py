"""Judge the base and the adapter on the same test rows, as `train.objective` has it.

Both are computed on the weights that training saw, dequantised once, with the adapter switched on and off. What is
written is laid out alike whatever the rows are; a figure that a kind of row does not have is left out.
"""

import json
from typing import Any

import pyarrow.parquet as parquet

from flows.base.model import check_base, load_dequantized, load_tokenizer
from flows.judging.chats import judge_chats
from flows.judging.classes import judge_classes
from flows.judging.judgement import Judgement
from flows.judging.pairs import judge_pairs
from flows.params import Params
from flows.paths import Paths
from flows.rows import Row, read_rows
from flows.stage import start
from flows.training.objectives import check_split, class_names, loss_function
from peftcore import PeftModel
from peftcore.files import directory_written_atomically, sha256, write_atomically


def run(params: Params, paths: Paths) -> None:
    """Evaluate; writes the rows, the metrics and a table of samples."""
    base = check_base(paths.base)
    check_split(params, paths.split("test"))
    rows = read_rows(paths.split("test"), limit=params.evaluate.rows)
    judgement = _judged(params, paths, rows)
    told: dict[str, Any] = {"objective": params.train.objective, "loss_function": loss_function(params)}
    told |= {"evaluation_set": sha256(paths.split("test")), "base_model": base}
    metrics = judgement.metrics | told
    with directory_written_atomically(paths.evaluation) as folder:
        parquet.write_table(judgement.table, folder / paths.evaluation_rows.name)
        for name, content in ((paths.evaluation_metrics.name, metrics), (paths.samples.name, judgement.samples)):
            write_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _judged(params: Params, paths: Paths, rows: list[Row]) -> Judgement:
    names, tokenizer = class_names(params, paths), load_tokenizer(paths.base)
    model = PeftModel.from_pretrained(load_dequantized(paths.base, params.quantization, names), paths.adapter)
    if names is not None:
        train_labels = [row["label"] for row in read_rows(paths.split("train"), ["label"])]
        return judge_classes(params, model, tokenizer, rows, names, train_labels)
    judge = judge_chats if params.train.objective == "sft" else judge_pairs
    return judge(params, model, tokenizer, rows)


if __name__ == "__main__":
    start(run)
