"""Log-probabilities of pairs under the model, and under its reference, which is the same model with other adapters.

The reference is the base (every adapter disabled), or a frozen adapter that training started from. Either way there is
one set of base weights, switching is one assignment, and nothing of the reference's forward is kept.

Shapes: P pairs of a chosen and a rejected answer.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.train.batches import REFERENCE_COLUMNS
from peftcore.train.losses import row_sums, token_losses
from peftcore.train.preference import PairLogProbs
from peftcore.train.weights import WEIGHT

_NOT_OF_THE_FORWARD = ("labels", WEIGHT, *REFERENCE_COLUMNS)


@contextlib.contextmanager
def reference_acting(model: Any, adapter: str | None = None) -> Iterator[None]:
    """The model as its own reference while inside: in evaluation mode, without gradients.

    model: a PeftModel; adapter: the one that acts alone, None for no adapter at all. Afterwards all is as before.
    """
    active, training = list(model.active_adapters), {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, active)
            model.set_adapter(adapter)
        model.eval()
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was


def pair_log_probs(model: nn.Module, batch: Mapping[str, Any]) -> PairLogProbs:
    """Of a PreferenceCollator's batch, in one forward; only supervised tokens reach the output head."""
    inputs = {name: value.flatten(0, 1) for name, value in batch.items() if name not in _NOT_OF_THE_FORWARD}
    sums, tokens = row_sums(*token_losses(model, inputs, batch["labels"].flatten(0, 1)))
    (chosen, rejected), (chosen_tokens, rejected_tokens) = (each.view(-1, 2).unbind(1) for each in (-sums, tokens))
    return PairLogProbs(chosen, rejected, chosen_tokens, rejected_tokens)


def stored_log_probs(batch: Mapping[str, Any], policy: PairLogProbs) -> PairLogProbs | None:
    """The reference's, where the batch holds them; policy: the model's own of the same batch."""
    if any(column not in batch for column in REFERENCE_COLUMNS):
        return None
    chosen, rejected = (batch[column].to(policy.chosen) for column in REFERENCE_COLUMNS)
    return PairLogProbs(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens)


def with_reference_columns(rows: Any, chosen: Tensor, rejected: Tensor) -> Any:
    """The rows, a datasets.Dataset or a sequence of mappings, with the reference's log-probabilities beside them."""
    columns = dict(zip(REFERENCE_COLUMNS, (chosen.tolist(), rejected.tolist()), strict=True))
    if hasattr(rows, "add_column"):
        for name, values in columns.items():
            rows = rows.add_column(name, values)
        return rows
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]
