"""Losses of an adapter on given test rows, computed as in the evaluate stage. No answers are generated.

    python -m flows.stages.reevaluate TASK.json ROWS.parquet

Keys of TASK.json:
    version: the adapter's version, for the progress bar.
    params: the parameters of the adapter's run, with the caller's section `evaluate`.
    base, adapter: folders.
    test: the file of the test split.
    rows: the number of rows to measure, from the first row of the split.
    labels: the names of the classes, or null.

ROWS.parquet gets the losses of the adapter only, not those of the base. After a PeftError or PipelineError, ROWS.txt
has the message, and the exit status is 1. Progress goes to stderr.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.base.model import check_base, load_dequantized, load_tokenizer, padding_id
from flows.data.rows import Row, read_rows
from flows.errors import PipelineError
from flows.evaluation.scoring import RowLosses, class_log_probs, pairs_log_probs, row_losses
from flows.params import Params
from flows.runtime.processes import watch_parent
from flows.runtime.progress import progress
from flows.runtime.stage import set_seed
from flows.training.objectives import check_split, preference_objective
from peftcore import PeftModel
from peftcore.errors import PeftError


def main() -> None:
    """Measure the rows that the task file describes, and write the losses or the message of a known error."""
    watch_parent()
    task, output = map(Path, sys.argv[1:])
    try:
        table = measure(json.loads(task.read_text()))
    except (PeftError, PipelineError) as error:
        output.with_suffix(".txt").write_text(str(error))
        sys.exit(1)
    parquet.write_table(table, output)


def measure(task: dict[str, Any]) -> pyarrow.Table:
    """Return a table with one row per test row: id, tokens, weight and adapter_loss (nats)."""
    params, base, test = Params.model_validate(task["params"]), Path(task["base"]), Path(task["test"])
    set_seed(params.project.seed)
    check_base(base)
    check_split(params, test)
    rows = read_rows(test, limit=task["rows"])
    model = PeftModel.from_pretrained(load_dequantized(base, params.quantization, task["labels"]), task["adapter"])
    with progress(len(rows), f"evaluate {task['version']} again", "row") as bar:
        losses = adapter_losses(params, model, rows, padding_id(load_tokenizer(base)), bar)
    columns = {"id": [row["id"] for row in rows], "tokens": losses.tokens, "weight": losses.weights}
    return pyarrow.table(columns | {"adapter_loss": losses.means})


def adapter_losses(params: Params, model: Any, rows: list[Row], pad: int, bar: Any = None) -> RowLosses:
    """Return the loss of each row under the run's objective.

    Args:
        params: The parameters of the adapter's run.
        model: A PeftModel.
        rows: Prepared rows of the run's objective.
        pad: Token id of padding.
        bar: Progress bar that counts rows.
    """
    size = params.evaluate.batch_size
    if params.train.objective == "sft":
        return row_losses(model, rows, pad, size, bar)
    if params.train.objective == "classification":
        labels = torch.tensor([row["label"] for row in rows])[:, None]
        means = -class_log_probs(model, rows, pad, size, bar).gather(1, labels)[:, 0]
        return RowLosses(means.tolist(), [len(row["input_ids"]) for row in rows], _weights(rows))
    log_probs = pairs_log_probs(model, rows, pad, size, bar)
    with model.disable_adapter():
        reference = pairs_log_probs(model, rows, pad, size)
    losses, _ = preference_objective(params).losses(log_probs, reference)
    tokens = (reference.chosen_tokens + reference.rejected_tokens).int().tolist()
    return RowLosses(losses.tolist(), tokens, _weights(rows))


def _weights(rows: list[Row]) -> list[float]:
    return [row.get("weight", 1.0) for row in rows]


if __name__ == "__main__":
    main()
