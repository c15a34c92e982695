"""Evaluation of tagged words: loss, entity F1 as seqeval defines it, share of right tags, and calibration.

The base has no head for these tags. So the token classifier is compared with the tag frequencies of the training rows:
each tag has its frequency as probability, and the most frequent tag is the prediction for each word.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row
from flows.data.tokens import IGNORED
from flows.evaluation.calibration import class_calibration
from flows.evaluation.classes import frequencies
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics, prediction_samples
from flows.evaluation.scoring import RowLosses, tag_log_probs
from flows.params import Params
from flows.runtime.progress import progress
from peftcore.train import EntityCounts, TagScheme, entity_counts, summed_counts

TAGS = (
    ("label", pa.string()),
    ("base_prediction", pa.string()),
    ("adapter_prediction", pa.string()),
    ("entities", pa.int32()),
    ("base_entities", pa.int32()),
    ("adapter_entities", pa.int32()),
    ("base_correct", pa.int32()),
    ("adapter_correct", pa.int32()),
)
"""Columns after the common ones: tags with spaces between them, and numbers of true, predicted and correct entities."""


def evaluate_tags(
    params: Params,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    names: list[str],
    train_labels: Sequence[Sequence[int]],
) -> EvaluationResult:
    """Evaluate the token classifier against the tag frequencies.

    Args:
        params: The parameters of the run.
        model: The token classifier.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
        names: Names of the tags, by index.
        train_labels: Labels of the training rows, -100 at tokens that begin no word.
    """
    with progress(len(rows), "evaluate", "row") as bar:
        adapter = tag_log_probs(model, rows, padding_id(tokenizer), params.evaluate.batch_size, bar)
    prior = frequencies([label for row in train_labels for label in row if label != IGNORED], len(names))
    labels = [known for _, known in adapter]
    log_probs = {
        "base": [prior.expand(len(known), -1) for known in labels],
        "adapter": [of_tags for of_tags, _ in adapter],
    }
    losses, sides, tags, counts = {}, {}, {}, {}
    for name, of_rows in log_probs.items():
        losses[name] = tag_losses(list(zip(of_rows, labels, strict=True)), rows)
        predicted = [of_tags.argmax(1) for of_tags in of_rows]
        tags[name] = tag_names(predicted, names)
        counts[name] = row_counts(rows, tags[name], params.data.tag_scheme)
        total = summed_counts(counts[name])
        right = sum(int((one == known).sum()) for one, known in zip(predicted, labels, strict=True))
        sides[name] = {
            "loss": losses[name].loss,
            "entity_f1": total.f1,
            "precision": total.precision,
            "recall": total.recall,
            "tag_accuracy": right / sum(map(len, labels)),
        }
    gains = ["entity_f1", "precision", "recall", "tag_accuracy"]
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], gains)
    metrics["baseline"] = "a prediction of the tag frequencies of the training rows"
    metrics["calibration"] = {
        name: class_calibration(torch.cat(of_rows), torch.cat(labels)) for name, of_rows in log_probs.items()
    }
    table = common_columns(rows, losses["base"], losses["adapter"])
    for i, row in enumerate(table):
        row |= {"label": rows[i]["tags"], "entities": counts["adapter"][i].true}
        for name in log_probs:
            row |= entity_columns(name, tags[name][i], counts[name][i])
    samples = prediction_samples(rows, table[: params.evaluate.samples])
    return EvaluationResult(metrics, pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *TAGS])), samples)


def tag_losses(log_probs: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Row]) -> RowLosses:
    """Return the mean loss of each row's words; a row's weight is its number of words times its `weight`.

    Args:
        log_probs: Log-probabilities (words, tags) and labels (words,) of each row, as `tag_log_probs` returns them.
        rows: The prepared rows.
    """
    means = [-of_tags.gather(1, known[:, None]).mean().item() for of_tags, known in log_probs]
    words = [len(known) for _, known in log_probs]
    return RowLosses(means, words, [n * row.get("weight", 1.0) for n, row in zip(words, rows, strict=True)])


def tag_names(predictions: Sequence[Tensor], names: Sequence[str]) -> list[list[str]]:
    """Return the predicted tags of each row by name. predictions: indices of tags (words,) of each row."""
    return [[names[int(number)] for number in row.tolist()] for row in predictions]


def row_counts(rows: Sequence[Row], tags: Sequence[Sequence[str]], scheme: TagScheme) -> list[EntityCounts]:
    """Return the numbers of entities of each row, for its predicted tags."""
    return [entity_counts(row["tags"].split(), told, scheme) for row, told in zip(rows, tags, strict=True)]


def entity_columns(side: str, tags: Sequence[str], counts: EntityCounts) -> dict[str, Any]:
    """Return one side's columns of a row: predicted tags, and numbers of predicted and of correct entities."""
    return {
        f"{side}_prediction": " ".join(tags),
        f"{side}_entities": counts.predicted,
        f"{side}_correct": counts.correct,
    }
