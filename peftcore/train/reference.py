"""Log-probabilities of preference pairs under the model and under its reference.

The reference is the model as it was when training began (`reference_model`), the base without adapters, or a frozen
adapter (`reference_acting`). All of them share the base weights, and the reference's forward keeps no activations.

Shapes: P pairs of a chosen and a rejected answer.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import TrainingError
from peftcore.injection.activation import activate
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.training_flags import training_flags_restored
from peftcore.train.batches import REFERENCE_COLUMNS, WEIGHT
from peftcore.train.losses import row_sums, token_losses
from peftcore.train.preference import PairLogProbs

_NO_FORWARD_ARGUMENTS = ("labels", WEIGHT, *REFERENCE_COLUMNS)


def reference_model(model: Any, share_base: bool = True) -> Any:
    """Return a frozen copy of an adapted model as it is now, in evaluation mode: the reference of DPO, KTO or GRPO.

    The copy has its own adapters and shares the base weights, so it needs the adapters' memory once more. With new
    adapters (LoRA's B = 0) it equals the base; with trained adapters it equals the trained model.

    Args:
        model: A PeftModel, before a trainer gets it.
        share_base: Share the frozen base weights. Give False if they will be changed or sharded: FSDP, DeepSpeed,
            TRL's `sync_ref_model`.

    Raises:
        TrainingError: The model's `forward` has been replaced by a function that would still call the original model.
    """
    adapters = adapter_set(model)
    if _calls(vars(model).get("forward"), model):
        raise TrainingError(
            "the model's forward has been replaced by a function that calls this model, as TRL's trainers do; call "
            "reference_model before you make the trainer"
        )
    adapter_ids = {id(parameter) for name in adapters.configs for parameter in adapters.parameters(name)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in adapter_ids]
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in frozen} if share_base else {})
    return reference.requires_grad_(False).eval()


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same parameter tensors, for another adapter on the same weights.

    The copy costs the model's buffers and module objects only. Changes of a parameter in place change both models, so
    bitsandbytes is kept from repacking 4-bit weights of either model for inference on the CPU.
    """
    keep_quantized_weights_trainable(model)
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _calls(function: Any, model: nn.Module) -> bool:
    """Return True if a function refers to a method of the model; a copy of the function would refer to it too."""
    inner: Callable[..., Any] | None = getattr(function, "__func__", function)
    cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
    callables = [value for value in cells if callable(value) and value is not model]
    return any(getattr(value, "__self__", None) is model or _calls(value, model) for value in callables)


@contextlib.contextmanager
def reference_acting(model: Any, adapter: str | None = None) -> Iterator[None]:
    """Make a model compute the reference's outputs inside the context: in evaluation mode and without gradients.

    The active adapters and the training mode are restored on exit.

    Args:
        model: A PeftModel.
        adapter: Name of the adapter that is the reference. None: the base model is the reference.
    """
    active = list(model.active_adapters)
    with contextlib.ExitStack() as stack:
        if adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(activate, model, active)  # unlike the model's method, this changes no requires_grad
            activate(model, adapter)
        stack.enter_context(inference_mode(model))
        yield


@contextlib.contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; the training flags are restored on exit."""
    with torch.no_grad(), training_flags_restored(model):
        model.eval()
        yield


def pair_log_probs(model: nn.Module, batch: Mapping[str, Any]) -> PairLogProbs:
    """Return the log-probabilities of a PreferenceCollator's batch, from one forward; see `token_losses`."""
    inputs = {name: value.flatten(0, 1) for name, value in batch.items() if name not in _NO_FORWARD_ARGUMENTS}
    sums, tokens = row_sums(*token_losses(model, inputs, batch["labels"].flatten(0, 1)))
    (chosen, rejected), (chosen_tokens, rejected_tokens) = (each.view(-1, 2).unbind(1) for each in (-sums, tokens))
    return PairLogProbs(chosen, rejected, chosen_tokens, rejected_tokens)


def row_log_probs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log-probability of its supervised tokens, (B,) in nats, and their number, (B,).

    Args:
        model: A causal language model.
        input_ids: Token ids (B, T), padded on the right.
        attention_mask: 1 for tokens and 0 for padding, (B, T).
        labels: (B, T), -100 at positions that are not supervised.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    sums, tokens = row_sums(*token_losses(model, inputs, labels))
    return -sums, tokens


def stored_log_probs(batch: Mapping[str, Any], policy: PairLogProbs) -> PairLogProbs | None:
    """Return the reference's log-probabilities from the columns of a batch, or None if it has no such columns."""
    if any(column not in batch for column in REFERENCE_COLUMNS):
        return None
    chosen, rejected = (batch[column].to(policy.chosen) for column in REFERENCE_COLUMNS)
    return PairLogProbs(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens)


def with_reference_columns(rows: Any, chosen: Tensor, rejected: Tensor) -> Any:
    """Return rows (a datasets.Dataset or a sequence of mappings) with the reference's log-probabilities as columns."""
    columns = dict(zip(REFERENCE_COLUMNS, (chosen.tolist(), rejected.tolist()), strict=True))
    if hasattr(rows, "add_column"):
        for name, values in columns.items():
            rows = rows.add_column(name, values)
        return rows
    return [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]
