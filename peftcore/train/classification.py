"""A Trainer for labelled texts: cross entropy of a classification head, accuracy and macro-F1.

    loss = −Σ_e w_e c_{y_e} log softmax(z_e)[y_e] / Σ_e w_e c_{y_e}

w_e: weight of text e. c: class weights. z: logits. y: class numbers.

Shapes: E texts, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT, with_model_padding
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.trainer import AdapterTrainerMixin


def balanced_class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Return class weights under which all classes have the same total weight.

    Args:
        labels: Class number of each of E texts.
        classes: Number of classes, C.

    Returns:
        E / (C n_c) for a class with n_c texts; 0 for a class without texts.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes)
    return [len(labels) / (classes * n) if n else 0.0 for n in counts.tolist()]


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """Return the mean of F1 = 2TP / (2TP + FP + FN) over the classes among labels or predictions, each (E,)."""
    labels, predictions = labels.long(), predictions.long()
    classes = int(torch.cat([labels, predictions]).max()) + 1
    hits = torch.bincount(labels[labels == predictions], minlength=classes)
    occurrences = torch.bincount(labels, minlength=classes) + torch.bincount(predictions, minlength=classes)
    present = occurrences > 0
    return (2 * hits[present] / occurrences[present]).double().mean().item()


class ClassificationObjective(ExampleObjective):
    """Weighted cross entropy of a sequence classifier.

    Args:
        trainer: The trainer that minimises this objective.
        class_weights: One weight for each class. None: all weights are 1.
    """

    collator_name = "ClassificationCollator"

    def __init__(self, trainer: Any, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(trainer)
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def check(self) -> None:
        """Raise TrainingError also if the number of class weights is not the number of the model's classes."""
        super().check()
        classes = getattr(getattr(self.trainer.model, "config", None), "num_labels", None)
        if self.class_weights is not None and classes is not None and len(self.class_weights) != classes:
            raise TrainingError(
                f"class_weights has {len(self.class_weights)} values, but the model has {classes} classes"
            )

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of labelled texts."""
        return ["input_ids", "label", WEIGHT]

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return each text's weight times the weight of its class, (E,)."""
        weights, labels = super().example_weights(inputs), inputs["labels"].clamp(min=0)
        return weights if self.class_weights is None else weights * self.class_weights.to(labels.device)[labels]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cross entropies (E,) in nats, and the accuracy of each text."""
        losses, predictions = self._classify(model, inputs)
        return losses, {"accuracy": (predictions == inputs["labels"]).to(losses)}

    def _classify(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return losses and predicted classes, each (E,)."""
        labels = inputs["labels"]
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}
        logits = model(**with_model_padding(model, arguments)).logits
        if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
            raise TrainingError(
                f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for {len(labels)} texts; a "
                "classifier returns (texts, classes), two classes or more: load AutoModelForSequenceClassification"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.device)
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return weighted `loss`, `weight`, `label` and `prediction` of each text, (E,)."""
        losses, predictions = self._classify(model, inputs)
        weights = self.example_weights(inputs).to(losses)
        return {"loss": losses * weights, WEIGHT: weights, "label": inputs["labels"], "prediction": predictions}

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return `loss`, `accuracy` and `macro_f1` of the set."""
        labels, predictions = (torch.cat([b[name][b[WEIGHT] > 0] for b in batches]) for name in ("label", "prediction"))
        losses = [{name: batch[name] for name in ("loss", WEIGHT)} for batch in batches]
        return super().set_metrics(losses) | {
            "accuracy": (labels == predictions).double().mean().item(),
            "macro_f1": macro_f1(labels, predictions),
        }


class ClassificationTrainerMixin(AdapterTrainerMixin):
    """Classification for any Trainer class: `class MyTrainer(ClassificationTrainerMixin, Trainer): ...`.

    The model returns `logits` (E, C), one row for each text. The arguments are those of AdapterTrainerMixin and:

    Args:
        class_weights: One weight for each class. None: all weights are 1.

    Raises:
        TrainingError: The number of class weights is not the number of classes, or the rows are packed.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, class_weights: Sequence[float] | None = None, **kwargs: Any) -> None:
        self._class_weights = class_weights
        super().__init__(*args, **kwargs)

    def make_objective(self) -> ClassificationObjective:
        """Return the weighted cross entropy of classes."""
        return ClassificationObjective(self, self._class_weights)


class ClassificationTrainer(ClassificationTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel over a sequence classifier."""
