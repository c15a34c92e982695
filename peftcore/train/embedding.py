"""A Trainer for text embeddings: contrastive loss over queries, their passages, and hard negatives.

In training, the candidates of a query are the passages of its batch, of one process. In evaluation they are those of
the whole set, so the metrics do not depend on the batches.

With `rows_at_once`, rows are embedded in parts, and each part is embedded again in the backward pass (as in GradCache,
Gao et al., arXiv:2101.06983). The loss and its gradients are those of the whole batch; the memory is that of a part.

Shapes: B rows, n hard negatives of a row, T positions, D dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT, LengthGroupedSampler, RightPaddingCollator, row_weights
from peftcore.train.contrastive import Contrastive, Pooling, false_negatives, pool
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.ranking import ranking_metrics, retrieval_ranks
from peftcore.train.trainer import AdapterTrainerMixin

RETRIEVAL_COLUMNS = ("query_input_ids", "positive_input_ids", "negatives_input_ids")
"""Columns of a row: token ids of a query, of its passage, and of hard negatives (a list of lists, may be empty)."""
_KEYS = "text_keys"
_QUERY, _POSITIVE, _NEGATIVES = 0, 1, slice(2, None)  # places of a row's texts


@dataclass
class EmbeddingCollator(RightPaddingCollator):
    """Collator of B rows of RETRIEVAL_COLUMNS into tensors (B, 2 + n, T): query, positive, negatives.

    A row with fewer negatives than another has texts without tokens, which take no part in the loss.

    Args:
        negatives: Hard negatives n of each row; further ones are left out. None: those of the batch's row with most.
    """

    negatives: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (B, 2 + n, T), `text_keys` (B, 2 + n) and `weight` (B,).

        Equal texts have equal keys.
        """
        most = max(len(row["negatives_input_ids"]) for row in rows) if self.negatives is None else self.negatives
        texts: list[list[int]] = []
        for row in rows:
            negatives = list(row["negatives_input_ids"])[:most]
            texts += [row["query_input_ids"], row["positive_input_ids"], *negatives, *[[]] * (most - len(negatives))]
        batch = self._padded([{"input_ids": ids, "labels": []} for ids in texts])
        del batch["labels"]
        batch[_KEYS] = torch.tensor([hash(tuple(ids)) for ids in texts])  # of integers, so the same in each process
        batch = {name: tensor.unflatten(0, (len(rows), 2 + most)) for name, tensor in batch.items()}
        return batch | {WEIGHT: row_weights(rows)}


def embed(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling = "mean", normalize: bool = True
) -> Tensor:
    """Return embeddings (N, D) of texts.

    Args:
        model: An encoder or decoder without a head, as AutoModel loads it.
        input_ids: Token ids (N, T).
        attention_mask: 1 for tokens, 0 for padding on the right (N, T).
        pooling: See `pool`.
        normalize: See `pool`.

    Raises:
        TrainingError: The model returns no hidden states.
    """
    width = max(1, int(attention_mask.sum(1).max()))
    ids, mask = input_ids[:, :width], attention_mask[:, :width]
    hidden = getattr(model(input_ids=ids, attention_mask=mask), "last_hidden_state", None)
    if hidden is None:
        raise TrainingError(f"{type(model).__name__} returns no last_hidden_state; load the base by AutoModel")
    text = hidden[:, hidden.shape[1] - mask.shape[1] :]  # a prompt's virtual tokens stand before the text
    return pool(text, mask, pooling, normalize)


class EmbeddingObjective(ExampleObjective):
    """Weighted mean of the contrastive loss over rows.

    Args:
        trainer: The trainer that minimises this objective.
        contrastive: The loss.
        pooling: See `pool`.
        normalize: See `pool`.
        rows_at_once: Rows whose activations are in memory at the same time; None: all rows of the batch.
    """

    collator_name = "EmbeddingCollator"

    def __init__(
        self, trainer: Any, contrastive: Contrastive, pooling: Pooling, normalize: bool, rows_at_once: int | None
    ) -> None:
        super().__init__(trainer)
        self.contrastive = contrastive
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.rows_at_once = rows_at_once

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of the dataset that the loss reads, whatever the model's signature."""
        return [*RETRIEVAL_COLUMNS, WEIGHT]

    def lengths(self, dataset: Any) -> list[int]:
        """Return the tokens of each row's longest text."""
        return [
            max(map(len, [row["query_input_ids"], row["positive_input_ids"], *row["negatives_input_ids"]]))
            for row in dataset
        ]

    def parts(self, inputs: dict[str, Any], rows: int) -> list[dict[str, Any]]:
        """Return the whole batch, whose rows are each other's negatives; `embeddings` computes it in parts."""
        return [inputs]

    def example_weights(self, inputs: dict[str, Any]) -> Tensor:
        """Return the weights (B,) of a batch's rows."""
        return inputs[WEIGHT]

    def embeddings(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the embeddings of a batch's texts (B, 2 + n, D); of absent texts zeros."""
        if _KEYS not in inputs:
            raise TrainingError(
                f"the batch has no {_KEYS!r}; give data_collator={self.collator_name}(pad_token_id), and rows of "
                f"{', '.join(RETRIEVAL_COLUMNS)}"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        limits = (self.rows_at_once, self.trainer.splitter.rows_at_once if model.training else None)
        rows = min((limit for limit in limits if limit is not None), default=len(ids))
        if rows >= len(ids):
            return self._embedded(model, ids, mask)
        parts = zip(ids.split(rows), mask.split(rows), strict=True)
        return torch.cat([checkpoint(self._embedded, model, *part, use_reentrant=False) for part in parts])

    def _embedded(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        present = mask[:, 1:].any(-1)
        queries = embed(model, ids[:, _QUERY], mask[:, _QUERY], self.pooling, self.normalize)
        vectors = embed(model, ids[:, 1:][present], mask[:, 1:][present], self.pooling, self.normalize)
        placed = vectors.new_zeros(*present.shape, vectors.shape[-1]).masked_scatter(present[..., None], vectors)
        return torch.cat([queries[:, None], placed], dim=1)

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses (B,) in nats, and `accuracy`: the positive is the nearest candidate of the batch."""
        return self._losses(self.embeddings(model, inputs), inputs)

    def _losses(self, texts: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        present, keys = inputs["attention_mask"].any(-1), inputs[_KEYS]
        queries, positives = texts[:, _QUERY], texts[:, _POSITIVE]
        negatives = texts[:, _NEGATIVES][present[:, _NEGATIVES]]
        negative_keys = keys[:, _NEGATIVES][present[:, _NEGATIVES]]
        masked = None
        if self.contrastive.mask_false_negatives:
            masked = false_negatives(keys[:, _QUERY], keys[:, _POSITIVE], negative_keys)
        losses = self.contrastive.losses(queries, positives, negatives, masked)
        with torch.no_grad():
            scores = queries @ torch.cat([positives, negatives]).T
            scores = scores if masked is None else scores.masked_fill(masked, -torch.inf)
            accuracy = (scores.argmax(1) == torch.arange(len(scores), device=scores.device)).to(losses)
        return losses, {"accuracy": accuracy}

    # -- evaluation --------------------------------------------------------------------------------------------

    def row_metrics(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return `weight`, and embeddings and keys of each row's texts; `loss` is weighted, and that of the batch."""
        texts = self.embeddings(model, inputs)
        losses, _ = self._losses(texts, inputs)
        weights = self.example_weights(inputs).to(losses)
        padded = self.trainer.accelerator.pad_across_processes  # a batch of another process may have more negatives
        present = inputs["attention_mask"].any(-1).long()  # padding would turn bool into int64, in one process alone
        places = {"texts": texts, _KEYS: inputs[_KEYS], "present": present}
        places = {name: padded(tensor, dim=1) for name, tensor in places.items()}
        return {"loss": losses * weights, WEIGHT: weights, **places}

    def set_metrics(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return the weighted mean `loss` and the ranking metrics, with all passages of the set as candidates."""
        if not batches or not (weights := torch.cat([batch[WEIGHT] for batch in batches]).double()).sum():
            raise TrainingError("the evaluation set is empty, or all its weights are 0; add rows with a weight above 0")
        evaluation = evaluate_texts(
            self.contrastive,
            *(torch.cat([batch[name][:, place] for batch in batches]) for name in ("texts", _KEYS) for place in (0, 1)),
            *(
                torch.cat([batch[name][:, _NEGATIVES][batch["present"][:, _NEGATIVES] > 0] for batch in batches])
                for name in ("texts", _KEYS)
            ),
        )
        counted = weights > 0
        loss = (evaluation.pop("loss") * weights).sum() / weights.sum()
        return {"loss": loss.item(), **{name: values[counted].mean().item() for name, values in evaluation.items()}}


def evaluate_texts(
    contrastive: Contrastive,
    queries: Tensor,
    positives: Tensor,
    query_keys: Tensor,
    positive_keys: Tensor,
    negatives: Tensor,
    negative_keys: Tensor,
) -> dict[str, Tensor]:
    """Return `loss` (nats) and the metrics of `ranking_metrics` of each row, (B,), with all passages as candidates.

    Equal passages count once in the ranking. The other right answers to a query take no part in its ranking; right
    answers are the passages that are its positive in some row.

    Args:
        contrastive: The loss.
        queries: Embeddings (B, D).
        positives: Embeddings of each query's positive (B, D).
        query_keys: An integer for each query, equal for equal texts (B,).
        positive_keys: The same of the positives (B,).
        negatives: Embeddings of all hard negatives (N, D).
        negative_keys: Their integers (N,).
    """
    masked = false_negatives(query_keys, positive_keys, negative_keys) if contrastive.mask_false_negatives else None
    losses = contrastive.losses(queries, positives, negatives, masked)
    passages, keys = torch.cat([positives, negatives]), torch.cat([positive_keys, negative_keys]).tolist()
    first: dict[int, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    index = {key: number for number, key in enumerate(first)}
    right = [index[key] for key in positive_keys.tolist()]
    answers: dict[int, set[int]] = {}
    for query, passage in zip(query_keys.tolist(), right, strict=True):
        answers.setdefault(query, set()).add(passage)
    rank = retrieval_ranks(
        queries,
        passages[torch.tensor(list(first.values()))],
        torch.tensor(right),
        [sorted(answers[query]) for query in query_keys.tolist()],
    )
    return {"loss": losses.double(), **ranking_metrics(rank)}


class EmbeddingTrainerMixin(AdapterTrainerMixin):
    """Text embeddings for any Trainer class: `class MyTrainer(EmbeddingTrainerMixin, Trainer): ...`.

    The collator is an EmbeddingCollator. The model is a PeftModel over a model without a head (AutoModel), with
    `TaskType.FEATURE_EXTRACTION`. The arguments are those of AdapterTrainerMixin and:

    Args:
        contrastive: The loss. None: `Contrastive()`.
        pooling: "mean", "cls" or "last"; see `pool`.
        normalize: Embeddings are unit vectors.
        rows_at_once: Rows whose activations are in memory at the same time; None: all rows of the batch. Fewer need
            less memory and one more forward pass, and give the same gradients.

    Raises:
        TrainingError: The model returns no hidden states, or the rows are packed.
    """

    loss_is_scaled_for_ga = True
    training_objective: EmbeddingObjective

    def __init__(
        self,
        *args: Any,
        contrastive: Contrastive | None = None,
        pooling: Pooling = "mean",
        normalize: bool = True,
        rows_at_once: int | None = None,
        **kwargs: Any,
    ) -> None:
        loss = Contrastive() if contrastive is None else contrastive
        self._embedding_options = loss, pooling, normalize, rows_at_once
        super().__init__(*args, **kwargs)

    def make_objective(self) -> EmbeddingObjective:
        """Return the contrastive loss of texts."""
        return EmbeddingObjective(self, *self._embedding_options)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return batches of similar length for "group_by_length", whose lengths Trainer would not find."""
        if not self.groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(self.training_objective.lengths(eval_dataset), self.args.eval_batch_size)


class EmbeddingTrainer(EmbeddingTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel that embeds texts."""
