"""Fidelity of one model's embeddings to another's: cosine similarities, and the passages that queries find."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.evaluation.embeddings import embeddings, texts_of
from flows.evaluation.fidelity import Fidelity, Reference
from flows.params import Params
from flows.training.objectives.embedding import contrastive_loss


@dataclass(frozen=True)
class EmbeddingFidelity(Fidelity):
    """Means over rows; a row's prediction is the softmax of its query's scaled similarities to all passages."""

    cosine: float
    """Mean cosine similarity of a text's two embeddings."""
    least_cosine: float
    """Smallest cosine similarity of a text's two embeddings."""

    def __str__(self) -> str:
        return f"cosine {self.cosine:.5f} (at least {self.least_cosine:.5f}), {super().__str__()}"


def embedding_fidelity(
    params: Params, reference: Reference, candidate: nn.Module, bar: Any = None
) -> EmbeddingFidelity:
    """Compare the embeddings of two models. Each row counts as one token.

    Args:
        params: The parameters of the run.
        reference: The reference model and its rows.
        candidate: The model to compare.
        bar: Progress bar that counts rows.
    """
    options, texts, rows = params.train.embedding, texts_of(reference.rows), len(reference.rows)

    predict = partial(
        embeddings,
        texts=texts,
        pad=reference.pad,
        batch_size=reference.batch_size,
        pooling=options.pooling,
        normalize=options.normalize,
    )
    vectors = reference.predictions(0, predict), predict(candidate)
    cosines = F.cosine_similarity(*vectors, dim=-1).double().clamp(max=1)  # rounding exceeds 1
    scores = [options.scale * each[:rows] @ each[rows:].T for each in vectors]
    p, q = (each.double().log_softmax(-1) for each in scores)
    reference_loss, loss = (_loss(params, each, rows) for each in vectors)
    if bar is not None:
        bar.update(rows)
    return EmbeddingFidelity(
        kl=(p.exp() * (p - q)).sum(1).mean().item(),
        top1_agreement=(p.argmax(1) == q.argmax(1)).double().mean().item(),
        loss=loss,
        reference_loss=reference_loss,
        tokens=rows,
        cosine=cosines.mean().item(),
        least_cosine=cosines.min().item(),
    )


@torch.no_grad()
def _loss(params: Params, vectors: Tensor, rows: int) -> float:
    """Return the mean contrastive loss over the rows, without a mask of false negatives."""
    parts = vectors[:rows], vectors[rows : 2 * rows], vectors[2 * rows :]
    return contrastive_loss(params).losses(*parts).double().mean().item()
