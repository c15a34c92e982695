"""Log-probabilities of pairs under the model, and under its reference.

The reference is the model as it was when training began (`reference_model`), the base with every adapter disabled, or a
frozen adapter (`reference_acting`). Each way there is one set of base weights, and nothing of the reference's forward
is kept.

Shapes: P pairs of a chosen and a rejected answer.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import TrainingError
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.training_flags import training_flags_restored
from peftcore.train.batches import REFERENCE_COLUMNS, WEIGHT
from peftcore.train.losses import row_sums, token_losses
from peftcore.train.preference import PairLogProbs

_NOT_OF_THE_FORWARD = ("labels", WEIGHT, *REFERENCE_COLUMNS)


def reference_model(model: Any, share_base: bool = True) -> Any:
    """Return a frozen copy of an adapted model as it is now, in evaluation mode: the reference of DPO, KTO or GRPO.

    The copy has adapters of its own and the base's own weights, so it costs the adapters' memory once more. Adapters
    that are a start (LoRA's B = 0) make it the base; trained ones make it the trained model.

    Args:
        model: A PeftModel, before a trainer gets it.
        share_base: Use the model's frozen base weights, not copies. Give False where those weights will be changed or
            sharded: FSDP, DeepSpeed, TRL's `sync_ref_model`.

    Raises:
        TrainingError: Another object's `forward` stands in the model's place, which the copy would call.
    """
    adapters = adapter_set(model)
    if _calls(vars(model).get("forward"), model):
        raise TrainingError(
            "the model's forward has been replaced by a function that holds the model, as TRL's trainers do; call "
            "reference_model before the trainer is made"
        )
    own = {id(parameter) for name in adapters.configs for parameter in adapters.parameters(name)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in own]
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in frozen} if share_base else {})
    return made.requires_grad_(False).eval()


def _calls(function: Any, model: nn.Module) -> bool:
    """Whether a function holds a method of the model, so that a copy of it would still be the model's."""
    inner: Callable[..., Any] | None = getattr(function, "__func__", function)
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    held = [value for value in cells if callable(value) and value is not model]
    return any(getattr(value, "__self__", None) is model or _calls(value, model) for value in held)


@contextlib.contextmanager
def reference_acting(model: Any, adapter: str | None = None) -> Iterator[None]:
    """The model as its own reference while inside: in evaluation mode, without gradients.

    model: a PeftModel; adapter: the one that acts alone, None for no adapter at all. Afterwards all is as before.
    """
    active = list(model.active_adapters)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(training_flags_restored(model))
        if adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, active)
            model.set_adapter(adapter)
        model.eval()
        yield


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
