"""Evaluation of labelled texts: loss, accuracy, macro-F1 and calibration of the classifier.

The base has no head for these classes. So the classifier is compared with the class frequencies of the training rows:
each class has its frequency as probability, and the most frequent class is the prediction.
"""

import math
from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flows.base.folder import padding_id
from flows.data.rows import Row, row_weights
from flows.evaluation.calibration import class_calibration
from flows.evaluation.result import COMMON, EvaluationResult, common_columns, common_metrics, prediction_samples
from flows.evaluation.scoring import RowLosses, class_log_probs
from flows.params import Params
from flows.runtime.progress import progress
from peftcore.train import macro_f1

CLASSES = (
    ("label", pa.string()),
    ("base_prediction", pa.string()),
    ("adapter_prediction", pa.string()),
    ("adapter_confidence", pa.float64()),
)
"""Columns after the common ones: names of classes, and the probability of the predicted class."""


def evaluate_classes(
    params: Params,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    names: list[str],
    train_labels: Sequence[int],
) -> EvaluationResult:
    """Evaluate the classifier against the class frequencies.

    Args:
        params: The parameters of the run.
        model: The classifier.
        tokenizer: The base's tokenizer.
        rows: Prepared rows of the test split.
        names: Names of the classes, by index.
        train_labels: Class indices of the training rows.
    """
    labels = torch.tensor([row["label"] for row in rows])
    with progress(len(rows), "evaluate", "row") as bar:
        adapter = class_log_probs(model, rows, padding_id(tokenizer), params.evaluate.batch_size, bar)
    log_probs = {"base": frequencies(train_labels, len(names)).expand(len(rows), -1), "adapter": adapter}
    tokens, weights = [len(row["input_ids"]) for row in rows], row_weights(rows)
    losses, sides, predictions = {}, {}, {}
    for name, of_classes in log_probs.items():
        losses[name] = RowLosses((-of_classes.gather(1, labels[:, None])[:, 0]).tolist(), tokens, weights)
        predictions[name] = of_classes.argmax(1)
        sides[name] = {
            "loss": losses[name].loss,
            "accuracy": (predictions[name] == labels).double().mean().item(),
            "macro_f1": macro_f1(labels, predictions[name]),
        }
    metrics = common_metrics(rows, losses, sides["base"], sides["adapter"], ["accuracy", "macro_f1"])
    metrics["baseline"] = "a prediction of the class frequencies of the training rows"
    metrics["calibration"] = {name: class_calibration(of_classes, labels) for name, of_classes in log_probs.items()}
    table = common_columns(rows, losses["base"], losses["adapter"])
    confidences = adapter.amax(1).exp().tolist()
    for i, row in enumerate(table):
        row |= {"label": names[int(labels[i])], "adapter_confidence": confidences[i]}
        row |= {f"{name}_prediction": names[int(predictions[name][i])] for name in predictions}
    samples = prediction_samples(rows, table[: params.evaluate.samples])
    return EvaluationResult(metrics, pa.Table.from_pylist(table, schema=pa.schema([*COMMON, *CLASSES])), samples)


def frequencies(labels: Sequence[int], classes: int) -> Tensor:
    """Return the log-frequencies (classes,) of the labels, with one added to each count (Laplace smoothing)."""
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes).double()
    return (counts + 1).log() - math.log(len(labels) + classes)
