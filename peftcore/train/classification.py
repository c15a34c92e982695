"""A Trainer for labelled texts: cross entropy of a classifier's head, accuracy and macro-F1.

    loss = −Σ_e w_e c_{y_e} log softmax(z_e)[y_e] / Σ_e w_e c_{y_e}

Shapes: E texts, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.example_objective import ExampleObjectiveMixin
from peftcore.train.trainer import AdapterTrainerMixin
from peftcore.train.weights import WEIGHT


def balanced_class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weights E / (C n_c) under which all classes weigh alike, n_c texts being of class c; 0 for one without texts."""
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes)
    return [len(labels) / (classes * n) if n else 0.0 for n in counts.tolist()]


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """Mean F1 = 2TP / (2TP + FP + FN) over the classes that occur among labels or predictions, each (E,)."""
    labels, predictions = labels.long(), predictions.long()
    classes = int(torch.cat([labels, predictions]).max()) + 1
    hits = torch.bincount(labels[labels == predictions], minlength=classes)
    occurrences = torch.bincount(labels, minlength=classes) + torch.bincount(predictions, minlength=classes)
    there = occurrences > 0
    return (2 * hits[there] / occurrences[there]).double().mean().item()


class ClassificationTrainerMixin(ExampleObjectiveMixin):
    """For any Trainer class: `class MyTrainer(ClassificationTrainerMixin, AdapterTrainerMixin, Trainer)`.

    The model gives `logits` (E, C), one row a text; class_weights: C of them, None: all 1.
    """

    _fitting_collator = "ClassificationCollator"

    def __init__(self, *args: Any, class_weights: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        if class_weights is not None and classes is not None and len(class_weights) != classes:
            raise TrainingError(f"class_weights are {len(class_weights)}, and the model has {classes} classes")
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "label", WEIGHT]

    def _weights(self, inputs: dict[str, Any]) -> Tensor:
        weights, labels = super()._weights(inputs), inputs["labels"].clamp(min=0)
        return weights if self._class_weights is None else weights * self._class_weights.to(labels.device)[labels]

    def _example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, predictions = self._classified(model, inputs)
        return losses, {"accuracy": (predictions == inputs["labels"]).to(losses)}

    def _classified(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses and predictions, each (E,)."""
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}).logits
        if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
            raise TrainingError(
                f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {len(labels)} texts; a "
                "classifier gives (texts, classes), two classes or more: load AutoModelForSequenceClassification"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.device)
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)

    @torch.no_grad()
    def _row_figures(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        prepared = dict(self._prepare_inputs(inputs))
        with self.compute_loss_context_manager():
            losses, predictions = self._classified(model, prepared)
        weights = self._weights(prepared).to(losses)
        return {"loss": losses * weights, WEIGHT: weights, "label": prepared["labels"], "prediction": predictions}

    def _evaluation_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        labels, predictions = (torch.cat([b[name][b[WEIGHT] > 0] for b in batches]) for name in ("label", "prediction"))
        weighed = [{name: batch[name] for name in ("loss", WEIGHT)} for batch in batches]
        return super()._evaluation_metrics(weighed) | {
            "accuracy": (labels == predictions).double().mean().item(),
            "macro_f1": macro_f1(labels, predictions),
        }


class ClassificationTrainer(ClassificationTrainerMixin, AdapterTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel over a sequence classifier."""
