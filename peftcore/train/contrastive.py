"""Contrastive loss of text embeddings, with the other rows' passages as negatives.

    ℓ_i = −log( exp(s q_i·p_i) / Σ_{c ∈ C_i} exp(s q_i·c) )

q: embeddings of queries. p: embeddings of their positive passages. C_i: the positives of all rows, and all hard
negatives, without the false negatives of query i. s: scale, the inverse of the temperature. The symmetric loss is the
mean of ℓ_i and of the loss with which passage i finds its query among all queries. For unit vectors, this is
MultipleNegativesRankingLoss of Sentence Transformers (Henderson et al., arXiv:1705.00652), also called InfoNCE
(van den Oord et al., arXiv:1807.03748).

Shapes: B rows, N hard negatives, D dimensions, T positions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.errors import ConfigError

Pooling = Literal["mean", "cls", "last"]
CHUNK = 512
"""Queries (count) whose similarities are in memory at the same time."""


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling = "mean", normalize: bool = True) -> Tensor:
    """Return one vector per text, (B, D).

    Args:
        hidden: Last hidden states (B, T, D).
        attention_mask: 1 for tokens, 0 for padding on either side (B, T). Each text has a token.
        pooling: "mean" of the tokens, "cls" (the first token) or "last" (the last token, for decoders).
        normalize: Divide each vector by its length, so that dot products are cosine similarities.

    Raises:
        ConfigError: `pooling` is unknown.
    """
    if pooling == "mean":
        mask = attention_mask[..., None].to(hidden)
        vectors = (hidden * mask).sum(1) / mask.sum(1)
    elif pooling in get_args(Pooling):
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        padding = attention_mask == 0
        if pooling == "cls":
            chosen = positions.masked_fill(padding, hidden.shape[1]).argmin(1)
        else:
            chosen = positions.masked_fill(padding, -1).argmax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), chosen]
    else:
        raise ConfigError(f"pooling must be one of {', '.join(get_args(Pooling))}; got {pooling!r}")
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return F.normalize(vectors, dim=-1) if normalize else vectors


@dataclass(frozen=True)
class Contrastive:
    """Options of the contrastive loss.

    Attributes:
        scale: Factor of the similarities, the inverse of the temperature.
        symmetric: Passages have to find their queries, too.
        mask_false_negatives: Leave passages out of a query's candidates that are right answers to it: those equal to
            its positive, and positives of other rows with the same query.

    Raises:
        ConfigError: The scale is not above 0.
    """

    scale: float = 20.0
    symmetric: bool = False
    mask_false_negatives: bool = True

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"scale must be above 0, such as 20; got {self.scale}")

    def losses(
        self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each row in nats, (B,).

        Args:
            queries: Embeddings (B, D).
            positives: Embeddings of each query's positive (B, D).
            negatives: Embeddings of the hard negatives of all rows (N, D); None: there are none.
            masked: True for passages that are no candidates of a query (B, B + N), positives before negatives, as
                `false_negatives` returns them; None: all are candidates.
        """
        passages = positives if negatives is None else torch.cat([positives, negatives])
        parts = []
        for start in range(0, len(queries), CHUNK):
            rows = torch.arange(start, min(start + CHUNK, len(queries)), device=queries.device)
            loss = self._cross_entropy(queries[rows] @ passages.T, rows, None if masked is None else masked[rows])
            if self.symmetric:
                backward = None if masked is None else masked[:, rows].T
                loss = (loss + self._cross_entropy(positives[rows] @ queries.T, rows, backward)) / 2
            parts.append(loss)
        return torch.cat(parts) if parts else queries.new_zeros(0)

    def _cross_entropy(self, similarity: Tensor, own: Tensor, masked: Tensor | None) -> Tensor:
        scores = self.scale * similarity
        if masked is not None:
            scores = scores.masked_fill(masked, -torch.inf)
        return F.cross_entropy(scores, own, reduction="none")


def false_negatives(query_keys: Tensor, positive_keys: Tensor, negative_keys: Tensor) -> Tensor:
    """Return True for passages that are right answers to a query and not its own positive, (B, B + N).

    Right answers to a query are the texts that are its positive in some row.

    Args:
        query_keys: An integer for each query, equal for equal texts (B,).
        positive_keys: The same of each row's positive (B,).
        negative_keys: The same of the hard negatives (N,).
    """
    passages = torch.cat([positive_keys, negative_keys])
    same_query = (query_keys[:, None] == query_keys[None]).to(torch.float32)
    same_passage = (positive_keys[:, None] == passages[None]).to(torch.float32)
    answers = same_query @ same_passage > 0
    answers[:, : len(query_keys)].fill_diagonal_(False)
    return answers
