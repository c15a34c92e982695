"""Outputs of the model of each objective, by which `flows.base.model` chooses the head to load."""

from flows.params import Params
from flows.paths import Paths
from flows.training.objectives import class_names

RELEVANCE = ("relevance",)
"""The output of a reranker: the higher, the better a passage answers a query."""


def model_outputs(params: Params, paths: Paths) -> tuple[str, ...] | None:
    """Return the names of the head's outputs: the classes, or a reranker's relevance.

    () for embeddings, whose model has no head; None for a language model.

    Raises:
        StageError: The objective has classes, and the prepared data have none.
    """
    if params.train.objective == "embedding":
        return ()
    if params.train.objective == "reranker":
        return RELEVANCE
    names = class_names(params, paths)
    return None if names is None else tuple(names)
