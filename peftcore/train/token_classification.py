"""A Trainer for tagged words: cross entropy of a token classifier, accuracy and entity F1.

    loss = −Σ_e w_e Σ_t c_{y_et} log softmax(z_et)[y_et] / Σ_e w_e Σ_t c_{y_et}

w_e: weight of row e. t: positions with a label, which is the first sub-token of each word. c: class weights. z: logits.
y: class numbers.

Shapes: E rows, T positions, C classes, n labelled positions of the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT
from peftcore.train.entities import EntityCounts, TagScheme, entity_counts, is_bio_tag
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.losses import IGNORED
from peftcore.train.trainer import AdapterTrainerMixin

_COUNTS = ("correct", "predicted", "true")
"""Row metrics from which entity F1 follows."""


def labelled_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (n, C), in float32 or wider, and a mask (E, T) of the labelled positions.

    Args:
        model: A token classifier.
        inputs: A batch with `labels` (E, T), -100 where a position has no label.

    Raises:
        TrainingError: The model returns no logits for each position, or only one class.
    """
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name not in ("labels", WEIGHT)}).logits
    if logits.dim() == 3:
        logits = logits[:, max(0, logits.shape[1] - labels.shape[1]) :]  # without a prompt's virtual tokens
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or logits.shape[2] < 2:
        raise TrainingError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for labels of shape "
            f"{tuple(labels.shape)}; a token classifier returns (rows, positions, classes), two classes or more: load "
            "AutoModelForTokenClassification"
        )
    mask = (labels != IGNORED).to(logits.device)
    logits = logits[mask]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), mask


class TokenClassificationObjective(ExampleObjective):
    """Weighted cross entropy of a token classifier.

    Args:
        trainer: The trainer that minimises this objective.
        class_weights: One weight for each class. None: all weights are 1.
        tags: Name of each class, for entity F1. None: no entity F1.
        scheme: "bio" or "plain" (`peftcore.train.entities`).
    """

    collator_name = "TokenClassificationCollator"

    def __init__(
        self,
        trainer: Any,
        class_weights: Sequence[float] | None = None,
        tags: Sequence[str] | None = None,
        scheme: TagScheme = "bio",
    ) -> None:
        super().__init__(trainer)
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.tags = None if tags is None else list(tags)
        self.scheme: TagScheme = scheme

    def check(self) -> None:
        """Raise TrainingError also if weights or tags do not fit the model's classes, or a tag the scheme."""
        super().check()
        classes = getattr(getattr(self.trainer.model, "config", None), "num_labels", None)
        for name, values in (("class_weights", self.class_weights), ("tags", self.tags)):
            if values is not None and classes is not None and len(values) != classes:
                raise TrainingError(f"{name} has {len(values)} values, but the model has {classes} classes")
        other = [tag for tag in self.tags or () if self.scheme == "bio" and not is_bio_tag(tag)]
        if other:
            raise TrainingError(f"{', '.join(other[:5])} is not O, B-TYPE or I-TYPE; give scheme='plain'")

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of tagged words."""
        return ["input_ids", "labels", WEIGHT]

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return each row's weight times the summed weights of its labels' classes, (E,)."""
        return super().example_weights(inputs) * self._label_weights(inputs["labels"]).sum(1)

    def _label_weights(self, labels: Tensor) -> Tensor:
        """Return the class weight of each label, 0 at positions without one, (E, T)."""
        labelled = labels != IGNORED
        if self.class_weights is None:
            return labelled.float()
        return labelled * self.class_weights.to(labels.device)[labels.clamp(min=0)]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the rows' weighted mean cross entropies (E,) in nats, and the share of right words of each row."""
        losses, right, _ = self._classify(model, inputs)
        words = (inputs["labels"] != IGNORED).sum(1).clamp(min=1).to(right)
        return losses, {"accuracy": right / words}

    def _classify(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses and numbers of right words, each (E,), and the predicted classes (n,)."""
        logits, mask = labelled_logits(model, inputs)
        labels, rows = inputs["labels"].to(mask.device)[mask], mask.nonzero()[:, 0]
        weights = self._label_weights(inputs["labels"]).to(logits)
        predictions = logits.argmax(-1)
        zeros = logits.new_zeros(len(mask))
        sums = zeros.index_add(0, rows, F.cross_entropy(logits, labels, reduction="none") * weights[mask])
        right = zeros.index_add(0, rows, (predictions == labels).to(logits))
        totals = weights.sum(1)
        return sums / totals.where(totals > 0, torch.ones_like(totals)), right, predictions

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return weighted `loss`, `weight`, right and all `words` of each row, and its entity counts, (E,)."""
        losses, right, predictions = self._classify(model, inputs)
        weights, mask = self.example_weights(inputs).to(losses), inputs["labels"] != IGNORED
        metrics = {"loss": losses * weights, WEIGHT: weights, "right": right, "words": mask.sum(1)}
        if self.tags is None:
            return metrics
        words = mask.sum(1).tolist()
        sides = [
            [[self.tags[number] for number in row.tolist()] for row in values.cpu().split(words)]
            for values in (inputs["labels"][mask], predictions)
        ]
        counts = torch.tensor([entity_counts(known, told, self.scheme) for known, told in zip(*sides, strict=True)])
        return metrics | dict(zip(_COUNTS, counts.to(losses.device).unbind(1), strict=True))

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return `loss`, `accuracy` of all words and, with tags, `entity_f1` of the set."""
        losses = super().set_metrics([{name: batch[name] for name in ("loss", WEIGHT)} for batch in batches])

        def total(name: str) -> int:
            return round(sum(batch[name][batch[WEIGHT] > 0].sum().item() for batch in batches))

        metrics = losses | {"accuracy": total("right") / total("words")}
        if self.tags is not None:
            metrics["entity_f1"] = EntityCounts(*map(total, _COUNTS)).f1
        return metrics


class TokenClassificationTrainerMixin(AdapterTrainerMixin):
    """Token classification for any Trainer class: `class MyTrainer(TokenClassificationTrainerMixin, Trainer): ...`.

    The model returns `logits` (E, T, C). The arguments are those of AdapterTrainerMixin and:

    Args:
        class_weights: One weight for each class. None: all weights are 1.
        tags: Name of each class; evaluation then has `entity_f1`. None: without it.
        scheme: "bio" or "plain" (`peftcore.train.entities`).

    Raises:
        TrainingError: Weights or tags do not fit the model's classes, a tag does not fit the scheme, or the rows are
            packed.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        class_weights: Sequence[float] | None = None,
        tags: Sequence[str] | None = None,
        scheme: TagScheme = "bio",
        **kwargs: Any,
    ) -> None:
        self._class_weights, self._tags = class_weights, tags
        self._scheme: TagScheme = scheme
        super().__init__(*args, **kwargs)

    def make_objective(self) -> TokenClassificationObjective:
        """Return the weighted cross entropy of tags."""
        return TokenClassificationObjective(self, self._class_weights, self._tags, self._scheme)


class TokenClassificationTrainer(TokenClassificationTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel over a token classifier."""
