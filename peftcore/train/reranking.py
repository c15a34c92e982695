"""A Trainer for rerankers: a score for each pair of a query and a passage, the right passage first in each row.

    softmax   ℓ = −log softmax(z)[0], over the row's passages (ListNet's top-1 loss, Cao et al., ICML 2007)
    binary    ℓ = mean over the row's passages c of −log σ(z_c) if c is right, else −log σ(−z_c)

z: scores of a row's passages.

Shapes: B rows, C passages of a row, T positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from peftcore.errors import ConfigError, TrainingError
from peftcore.train.batches import (
    WEIGHT,
    LengthGroupedSampler,
    RightPaddingCollator,
    row_weights,
    with_model_padding,
)
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.ranking import ranking_metrics, ranks
from peftcore.train.trainer import AdapterTrainerMixin

RerankingLoss = Literal["softmax", "binary"]
PAIRS_COLUMN = "pairs_input_ids"
"""Column of a row: token ids of the query with each passage (a list of lists), the right passage first."""
TYPES_COLUMN = "pairs_token_type_ids"
"""Column with the token types of the pairs, for models that have them; it may be absent."""


@dataclass
class RerankingCollator(RightPaddingCollator):
    """Collator of B rows of PAIRS_COLUMN into tensors (B, C, T); a row with fewer passages has pairs without tokens."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and perhaps `token_type_ids` (B, C, T), and `weight` (B,)."""
        most = max(len(row[PAIRS_COLUMN]) for row in rows)
        pairs = [ids for row in rows for ids in _filled(row[PAIRS_COLUMN], most)]
        batch = self._padded([{"input_ids": ids, "labels": []} for ids in pairs])
        del batch["labels"]
        if rows[0].get(TYPES_COLUMN) is not None:
            types = [ids for row in rows for ids in _filled(row[TYPES_COLUMN], most)]
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            for number, ids in enumerate(types):
                batch["token_type_ids"][number, : len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        batch = {name: tensor.unflatten(0, (len(rows), most)) for name, tensor in batch.items()}
        return batch | {WEIGHT: row_weights(rows)}


def _filled(sequences: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    return [*sequences, *[[]] * (count - len(sequences))]


def passage_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of a batch of RerankingCollator (B, C) in single precision; -inf for absent passages.

    Raises:
        TrainingError: The model does not return one number for each pair.
    """
    mask = inputs["attention_mask"]
    present = mask.any(-1)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs]
    logits = model(**with_model_padding(model, {name: inputs[name][present] for name in names})).logits
    if logits.shape != (int(present.sum()), 1):
        raise TrainingError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for {int(present.sum())} pairs; a "
            "reranker returns one number for each: load AutoModelForSequenceClassification with num_labels=1"
        )
    logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.full_like(present, -torch.inf, dtype=logits.dtype).masked_scatter(present, logits)


def reranking_losses(scores: Tensor, loss: RerankingLoss = "softmax") -> Tensor:
    """Return the loss of each row in nats, (B,).

    Args:
        scores: Scores of the passages, the right one first, and -inf for absent ones (B, C).
        loss: "softmax" or "binary".

    Raises:
        ConfigError: `loss` is unknown.
    """
    if loss == "softmax":
        return -scores.log_softmax(1)[:, 0]
    if loss != "binary":
        raise ConfigError(f"loss must be one of {', '.join(get_args(RerankingLoss))}; got {loss!r}")
    present = scores > -torch.inf
    wrong = F.softplus(scores.masked_fill(~present, 0)) * present
    wrong = torch.cat([F.softplus(-scores[:, :1]), wrong[:, 1:]], dim=1)
    return wrong.sum(1) / present.sum(1)


class RerankingObjective(ExampleObjective):
    """Weighted mean of the reranking loss over rows.

    Args:
        trainer: The trainer that minimises this objective.
        ranking_loss: "softmax" or "binary".
    """

    collator_name = "RerankingCollator"

    def __init__(self, trainer: Any, ranking_loss: RerankingLoss) -> None:
        super().__init__(trainer)
        reranking_losses(torch.zeros(1, 1), ranking_loss)  # refuses an unknown one
        self.ranking_loss: RerankingLoss = ranking_loss

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of the dataset that the loss reads, whatever the model's signature."""
        return [PAIRS_COLUMN, TYPES_COLUMN, WEIGHT]

    def lengths(self, dataset: Any) -> list[int]:
        """Return the tokens of each row's longest pair."""
        return [max(map(len, row[PAIRS_COLUMN])) for row in dataset]

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weights (B,) of a batch's rows."""
        if WEIGHT not in inputs:
            raise TrainingError(f"the batch has no {WEIGHT!r}; give data_collator={self.collator_name}(pad_token_id)")
        return inputs[WEIGHT]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (B,) in nats, and the metrics of each row's ranking."""
        scores = passage_scores(model, inputs)
        metrics = ranking_metrics(ranks(scores.detach(), scores.new_zeros(len(scores), dtype=torch.long)))
        metrics = {name: metrics[name].to(scores) for name in ("recall_at_1", "mrr_at_10", "ndcg_at_10")}
        return reranking_losses(scores, self.ranking_loss), {"accuracy": metrics["recall_at_1"], **metrics}


class RerankingTrainerMixin(AdapterTrainerMixin):
    """Rerankers for any Trainer class: `class MyTrainer(RerankingTrainerMixin, Trainer): ...`.

    The collator is a RerankingCollator. The model is a PeftModel over a sequence classifier with one output. The
    arguments are those of AdapterTrainerMixin and:

    Args:
        ranking_loss: "softmax" (over a row's passages) or "binary" (cross entropy of each passage).

    Raises:
        ConfigError: The loss is unknown.
        TrainingError: The model does not return one number for each pair, or the rows are packed.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, ranking_loss: RerankingLoss = "softmax", **kwargs: Any) -> None:
        self._ranking_loss: RerankingLoss = ranking_loss
        super().__init__(*args, **kwargs)

    def make_objective(self) -> RerankingObjective:
        """Return the reranking loss of rows."""
        return RerankingObjective(self, self._ranking_loss)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return batches of similar length for "group_by_length", whose lengths Trainer would not find."""
        if not self.groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(self.training_objective.lengths(eval_dataset), self.args.eval_batch_size)


class RerankingTrainer(RerankingTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel that scores pairs of a query and a passage."""
