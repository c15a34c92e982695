"""Losses of an adapter on given test rows, computed as in the evaluate stage, and the metrics that rules compare.

    python -m flows.stages.reevaluate TASK.json ROWS.parquet

Keys of TASK.json:
    version: the adapter's version, for the progress bar.
    params: the parameters of the adapter's run, with the caller's section `evaluate`.
    base, adapter: folders.
    test: the file of the test split.
    rows: the number of rows to measure, from the first row of the split.
    labels: the names of the classes; null without classes.
    metrics: optional; further metrics to measure, figures or names of scorers. These keys go with it:
    answered: the ids of the rows whose prompts are answered; max_new_tokens: maximum tokens of an answer.
    root: the repository, with the files of the scorers.

ROWS.parquet gets the losses and metrics of the adapter only, not those of the base. After a PeftError or PipelineError,
ROWS.txt has the message, and the exit status is 1. Progress goes to stderr.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

import flows.stages  # noqa: F401 - sets the variables that silence libraries, before their import
from flows.base.calibrated import calibrated_identity, check_adapter
from flows.base.folder import check_base, load_tokenizer, padding_id
from flows.base.model import load_for_evaluation
from flows.data.rows import Row, read_rows, row_weights
from flows.evaluation.embeddings import retrieval_values, row_tokens
from flows.evaluation.generation import generate_answers
from flows.evaluation.pairs import pair_margins
from flows.evaluation.rerankers import pair_tokens, ranking_values, row_scores
from flows.evaluation.rewards import check_finite, reward_accuracies, reward_losses
from flows.evaluation.scorers.rewards import load_scorers
from flows.evaluation.scorers.scores import ScoredAnswer, score_answers
from flows.evaluation.scorers.texts import Score
from flows.evaluation.scoring import (
    RowLosses,
    answers_log_probs,
    class_log_probs,
    pairs_log_probs,
    pairs_rewards,
    rouge_l,
    row_losses,
    sequence_losses,
    tag_log_probs,
)
from flows.evaluation.tags import entity_columns, row_counts, tag_losses, tag_names
from flows.evaluation.unpaired import answer_scores
from flows.params import Params, Scorer
from flows.runtime.progress import progress
from flows.runtime.stage import set_seed
from flows.runtime.task import run_task
from flows.training.objectives import (
    check_split,
    kto_objective,
    objective_of,
    preference_objective,
    reward_objective,
    rows_of,
)
from peftcore import PeftModel
from peftcore.train import RANKING_METRICS

_KNOWN = {"preference": ("chosen_input_ids", "chosen"), "seq2seq": ("input_ids", "target")}
"""{kind of rows: columns of a prompt's token ids and of the known answer's text}"""

Scorers = dict[str, tuple[Scorer, Score]]
"""{name: entry of `params.scorers` and its function}"""


def measure(task: dict[str, Any]) -> pyarrow.Table:
    """Return a table with one row per test row: id, tokens, weight and adapter_loss (nats), and the task's metrics."""
    params, base, test = Params.model_validate(task["params"]), Path(task["base"]), Path(task["test"])
    set_seed(params.project.seed)
    check_base(base)
    check_adapter(Path(task["adapter"]), calibrated_identity(base))
    check_split(params, test)
    rows = objective_of(params).complete_rows(params, base, read_rows(test, limit=task["rows"]))
    metrics = set(task.get("metrics", ()))
    wanted = [scorer for scorer in params.scorers if scorer.name in metrics]
    scorers = load_scorers(wanted, Path(task["root"])) if wanted else {}
    outputs = task["labels"] if objective_of(params).outputs is None else objective_of(params).outputs
    loaded = load_for_evaluation(base, params.quantization, outputs, rows_of(params).task)
    model = PeftModel.from_pretrained(loaded, task["adapter"])
    tokenizer = load_tokenizer(base)
    with progress(len(rows), f"evaluate {task['version']} again", "row") as bar:
        losses, columns = adapter_values(params, model, rows, padding_id(tokenizer), bar)
    measured = {"id": [row["id"] for row in rows], "tokens": losses.tokens, "weight": losses.weights}
    measured["adapter_loss"] = losses.means
    if not metrics:
        return pyarrow.table(measured)
    if params.train.objective == "token_classification":
        columns |= _tags(task, params, rows, columns["adapter_prediction"], scorers)
    elif task["labels"] is not None:
        columns |= _classes(task, rows, columns["adapter_prediction"], scorers)
    elif task["answered"]:
        columns |= _answers(task, params, model, tokenizer, rows, scorers)
    return pyarrow.table(measured | columns)


def adapter_losses(params: Params, model: Any, rows: list[Row], pad: int, bar: Any = None) -> RowLosses:
    """Return the loss of each row under the run's objective.

    Args:
        params: The parameters of the adapter's run.
        model: A PeftModel.
        rows: Prepared rows of the run's objective, with what `complete_rows` adds.
        pad: Token id of padding.
        bar: Progress bar that counts rows.
    """
    return adapter_values(params, model, rows, pad, bar)[0]


def adapter_values(
    params: Params, model: Any, rows: list[Row], pad: int, bar: Any = None
) -> tuple[RowLosses, dict[str, list[Any]]]:
    """Return the loss of each row, and columns of what other metrics follow from: margins, classes, or ranks.

    The arguments are those of `adapter_losses`.
    """
    size = params.evaluate.batch_size
    if rows_of(params).kind == "chat":
        return row_losses(model, rows, pad, size, bar), {}
    if params.train.objective == "classification":
        log_probs = class_log_probs(model, rows, pad, size, bar)
        labels = torch.tensor([row["label"] for row in rows])[:, None]
        means = -log_probs.gather(1, labels)[:, 0]
        losses = RowLosses(means.tolist(), [len(row["input_ids"]) for row in rows], row_weights(rows))
        return losses, {"adapter_prediction": log_probs.argmax(1).tolist()}
    if params.train.objective == "token_classification":
        of_rows = tag_log_probs(model, rows, pad, size, bar)
        return tag_losses(of_rows, rows), {"adapter_prediction": [of_tags.argmax(1) for of_tags, _ in of_rows]}
    if params.train.objective == "seq2seq":
        return sequence_losses(model, rows, pad, size, bar), {}
    if params.train.objective == "embedding":
        values = retrieval_values(params, model, rows, pad)
        if bar is not None:
            bar.update(len(rows))
        losses = RowLosses(values["loss"].tolist(), row_tokens(rows), row_weights(rows))
        return losses, {f"adapter_{name}": values[name].tolist() for name in RANKING_METRICS}
    if params.train.objective == "reranker":
        values = ranking_values(params, row_scores(model, rows, pad, size, bar))
        losses = RowLosses(values["loss"].tolist(), pair_tokens(rows), row_weights(rows))
        return losses, {f"adapter_{name}": values[name].tolist() for name in RANKING_METRICS}
    if params.train.objective == "kto":
        model_side = answers_log_probs(model, rows, pad, size, bar)
        with model.disable_adapter():
            base_side = answers_log_probs(model, rows, pad, size)
        scores = answer_scores(kto_objective(params), rows, model_side, base_side)
        columns = {"adapter_margin": scores.margins.tolist(), "adapter_accuracy": scores.accuracies.tolist()}
        return scores.losses, columns
    if params.train.objective == "reward":
        rewards = pairs_rewards(model, rows, pad, size, bar)
        check_finite(rows, rewards)
        margins = rewards[0] - rewards[1]
        columns = {"adapter_margin": margins.tolist(), "adapter_accuracy": reward_accuracies(margins).tolist()}
        return reward_losses(reward_objective(params), rows, rewards), columns
    log_probs, objective = pairs_log_probs(model, rows, pad, size, bar), preference_objective(params)
    with model.disable_adapter():
        reference = pairs_log_probs(model, rows, pad, size)
    losses, _ = objective.losses(log_probs, reference)
    tokens = (reference.chosen_tokens + reference.rejected_tokens).int().tolist()
    margins = {"adapter_margin": pair_margins(objective, log_probs).tolist()}
    return RowLosses(losses.tolist(), tokens, row_weights(rows)), margins


def _tags(
    task: dict[str, Any], params: Params, rows: list[Row], predictions: list[torch.Tensor], scorers: Scorers
) -> dict[str, list[Any]]:
    """Return columns with the true and the predicted tags, counts of entities, and scores."""
    predicted = tag_names(predictions, task["labels"])
    counts = row_counts(rows, predicted, params.data.tag_scheme)
    told = [entity_columns("adapter", *pair) for pair in zip(predicted, counts, strict=True)]
    columns: dict[str, list[Any]] = {name: [one[name] for one in told] for name in told[0]}
    columns |= {"label": [row["tags"] for row in rows], "entities": [one.true for one in counts]}
    answers = list(map(ScoredAnswer, rows, columns["adapter_prediction"], columns["label"]))
    return columns | _scores(task, scorers, answers, list(range(len(rows))), len(rows))


def _classes(task: dict[str, Any], rows: list[Row], predictions: list[int], scorers: Scorers) -> dict[str, list[Any]]:
    """Return columns with the names of the true and the predicted classes, and scores."""
    predicted = [task["labels"][index] for index in predictions]
    references = [task["labels"][row["label"]] for row in rows]
    answers = list(map(ScoredAnswer, rows, predicted, references))
    scores = _scores(task, scorers, answers, list(range(len(rows))), len(rows))
    return {"label": references, "adapter_prediction": predicted, **scores}


def _answers(
    task: dict[str, Any],
    params: Params,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    scorers: Scorers,
) -> dict[str, list[Any]]:
    """Return columns with text, ROUGE-L, end and scores of the adapter's answers; None for other rows."""
    ids, reference = _KNOWN.get(rows_of(params).kind, ("input_ids", "completion"))
    wanted = set(task["answered"])
    at = [index for index, row in enumerate(rows) if row["id"] in wanted]
    prompts = [rows[index][ids][: rows[index]["prompt_length"]] for index in at]
    with progress(len(prompts), f"answers of {task['version']}", "row") as bar:
        output = generate_answers(model, tokenizer, prompts, task["max_new_tokens"], params.evaluate.batch_size, bar)
    answers = [
        ScoredAnswer(rows[index], answer.text, rows[index][reference])
        for index, answer in zip(at, output.answers, strict=True)
    ]
    rouge = rouge_l([one.reference for one in answers], [one.answer for one in answers])
    ended = [answer.has_eos for answer in output.answers]
    return {
        "adapter_answer": _placed(at, [one.answer for one in answers], len(rows)),
        "adapter_rouge_l": _placed(at, rouge, len(rows)),
        "adapter_ended": _placed(at, ended, len(rows)),
        **_scores(task, scorers, answers, at, len(rows)),
    }


def _scores(
    task: dict[str, Any],
    scorers: Scorers,
    answers: list[ScoredAnswer],
    at: list[int],
    rows: int,
) -> dict[str, list[Any]]:
    """Return a column of scores for each scorer. at: the index of each answer's row, of `rows` rows."""
    return {
        f"adapter_{name}": _placed(at, score_answers(scorer, score, answers, task["version"]).values, rows)
        for name, (scorer, score) in scorers.items()
    }


def _placed(at: list[int], values: Sequence[Any], rows: int) -> list[Any]:
    """Return a column of `rows` values with the given ones at their indices, and None elsewhere."""
    column: list[Any] = [None] * rows
    for index, value in zip(at, values, strict=True):
        column[index] = value
    return column


if __name__ == "__main__":
    run_task(measure, parquet.write_table)
