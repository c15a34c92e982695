"""Check that a model's own loss is plain next-token cross entropy, without additional terms."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from peftcore.files.tensors import is_sharded
from peftcore.injection.forward_hooks import without_regularizers
from peftcore.train.head_hooks import flat_indices
from peftcore.train.losses import supervised_positions
from peftcore.train.out_of_memory import split_rows

_LOG = logging.getLogger(__name__)

_COMPARED_POSITIONS = 64
"""Positions (count) that are enough to compare losses; the logits of a long row would take gigabytes."""
_PRECISION = 2e-5
"""Relative and absolute difference (nats) of two equal losses, computed in float32."""


class ModelLossCheck:
    """Comparison of a model's own loss with cross entropy over supervised tokens, for one run.

    Many models add terms to the cross entropy: router balance, z-loss, losses of further inputs. No list of their flags
    is complete, so the model computes its own loss for one row of the first batch. This costs one forward pass without
    gradients for each combination of input names, in training and in evaluation mode.
    """

    def __init__(self) -> None:
        self._results: dict[tuple[bool, frozenset[str]], bool] = {}
        self.differs = False
        """True if any batch so far had a loss with further terms."""

    def agrees(self, model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> bool:
        """Return True if the model's own loss is the mean of `token_losses`, for this batch and all batches before.

        Args:
            model: A model for which `has_causal_loss` is true.
            inputs: Keyword arguments of the forward, without labels.
            labels: (B, T), -100 at positions that are not supervised.
        """
        if any(is_sharded(parameter) for parameter in model.parameters()):
            return True  # a sharded model's forward is a collective call, and not all processes would call it here
        key = (model.training, frozenset(inputs))
        if key not in self._results and not self.differs:
            self._results[key] = _model_loss_is_cross_entropy(model, inputs, labels)
            self.differs = not self._results[key]
        return not self.differs


def _model_loss_is_cross_entropy(model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> bool:
    rows = split_rows({**inputs, "labels": labels}, 1)
    row = next((each for each in rows if supervised_positions(each["labels"]).any()), None)
    if row is None:  # other processes may have labels, and then wait for this process's forward pass
        row = rows[0] | {"labels": torch.zeros_like(rows[0]["labels"])}
    row = _some_positions(row)
    inner = getattr(model, "module", model)  # a model inside of DistributedDataParallel
    name = type(inner).__name__
    devices = [] if labels.device.type == "cpu" else [labels.device]
    try:
        with (
            torch.no_grad(),
            without_regularizers(inner),
            torch.random.fork_rng(devices, device_type=labels.device.type),
        ):
            output = model(**row)
    except torch.OutOfMemoryError:
        _LOG.warning(
            "%s: the model's own loss of one row does not fit into memory, so it cannot be compared with next-token "
            "cross entropy; cross entropy is used",
            name,
        )
        return True
    model_loss = output.loss.float()
    mask = supervised_positions(row["labels"])
    logits = output.logits.flatten(0, 1)[flat_indices(mask, output.logits)]
    targets = row["labels"][:, 1:][mask[:, :-1]].to(logits.device)
    expected = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets).to(model_loss)
    precision = max(_PRECISION, torch.finfo(output.loss.dtype).eps)
    if torch.allclose(model_loss, expected, rtol=precision, atol=precision, equal_nan=True):
        return True
    _LOG.warning(
        "%s: the model's own loss is %.5g, but next-token cross entropy is %.5g, so its loss has further terms; the "
        "model's own loss is used, which computes the logits of all positions",
        *(name, model_loss.item(), expected.item()),
    )
    return False


def _some_positions(row: dict[str, Any]) -> dict[str, Any]:
    """Return some positions of a row, supervised ones among them; the whole row if its tensors differ in shape."""
    labels: Tensor = row["labels"]
    tensors = [value for value in row.values() if isinstance(value, Tensor)]
    if labels.shape[1] <= _COMPARED_POSITIONS or any(value.shape != labels.shape for value in tensors):
        return row
    first = int(supervised_positions(labels).any(0).nonzero()[0])
    start = min(max(0, first - _COMPARED_POSITIONS // 2), labels.shape[1] - _COMPARED_POSITIONS)
    positions = slice(start, start + _COMPARED_POSITIONS)
    return {name: value[:, positions] if isinstance(value, Tensor) else value for name, value in row.items()}


def has_causal_loss(model: nn.Module) -> bool:
    """Return True if the model computes next-token cross entropy. `ModelLossCheck` detects further terms."""
    config = getattr(model, "config", None)
    return (
        config is not None
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "output_router_logits", False)  # the loss then includes the experts' balance
        and getattr(model, "loss_function", None) is ForCausalLMLoss
        and _calls_loss_function(type(model))
    )


def _calls_loss_function(model_class: type) -> bool:
    # Decoders of encoder-decoder families also inherit `loss_function`, but their labels are shifted already.
    for parent in model_class.__mro__:
        forward = inspect.unwrap(vars(parent)["forward"]) if "forward" in vars(parent) else None
        if forward is not None and "loss_function" in forward.__code__.co_names:
            return True
        if forward is not None and "super" not in forward.__code__.co_names:
            return False
    return False
