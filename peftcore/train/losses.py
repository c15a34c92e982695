"""The causal language-model loss, computed only where a label is.

    loss = -(1/N) Σ_{(b,t): y_{b,t+1} ≠ -100} log softmax(h_{b,t} Wᵀ)[y_{b,t+1}]

The rows of h whose next token nobody supervises never reach the output head (with completions of 15 tokens behind
prompts of 200 and a vocabulary of 49,000, that is most of the head's time), and where the head is a plain linear layer
no logits are kept of the others either; `peftcore.train.supervised_head` says how.

Shapes: B rows, T positions, V vocabulary, n supervised next tokens in the batch.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from peftcore._util.tensors import is_sharded
from peftcore.train.head_rows import flat_indices
from peftcore.train.out_of_memory import parts_of
from peftcore.train.supervised_head import supervised_losses

_LOG = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that nobody supervises; transformers' and PyTorch's convention."""


class OwnLossCheck:
    """Comparison of a model's own loss with the cross entropy of its supervised tokens, for one run.

    Many models add terms to the cross entropy: router balance, z-loss, losses of further inputs. No list of their flags
    is complete, so one row of the first batch is computed in the model's own way. That costs one forward pass without
    gradients for each combination of input names, in training and in evaluation mode.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[bool, frozenset[str]], bool] = {}
        self.differs = False
        """Whether any batch so far had a loss with further terms."""

    def agrees(self, model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> bool:
        """Return whether the model's own loss is the mean of `token_losses`, here and in all batches before.

        Args:
            model: A model for which `has_causal_loss` holds.
            inputs: The forward's keyword arguments, without labels.
            labels: (B, T), -100 where not supervised.
        """
        if any(is_sharded(parameter) for parameter in model.parameters()):
            return True  # every forward pass gathers, so all processes would have to make this one, and agree
        key = (model.training, frozenset(inputs))
        if key not in self._verdicts and not self.differs:
            self._verdicts[key] = _own_loss_is_cross_entropy(model, inputs, labels)
            self.differs = not self._verdicts[key]
        return not self.differs


def _own_loss_is_cross_entropy(model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> bool:
    rows = parts_of({**inputs, "labels": labels}, 1)
    row = next((each for each in rows if supervised_positions(each["labels"]).any()), None)
    if row is None:  # other processes have labels, and may be waiting for this one's forward pass
        row = rows[0] | {"labels": torch.zeros_like(rows[0]["labels"])}
    row = _few_positions(row)
    name = type(getattr(model, "module", model)).__name__
    devices = [] if labels.device.type == "cpu" else [labels.device]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=labels.device.type):
            output = model(**row)
    except torch.OutOfMemoryError:
        _LOG.warning(
            "%s: one row's own loss does not fit into memory, so it is not known whether that loss has terms beside "
            "next-token cross entropy; the cross entropy alone is used",
            name,
        )
        return True
    own = output.loss.float()
    mask = supervised_positions(row["labels"])
    logits = output.logits.flatten(0, 1)[flat_indices(mask, output.logits)]
    targets = row["labels"][:, 1:][mask[:, :-1]].to(logits.device)
    expected = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets).to(own)
    precision = max(_PRECISION, torch.finfo(output.loss.dtype).eps)
    if torch.allclose(own, expected, rtol=precision, atol=precision, equal_nan=True):
        return True
    _LOG.warning(
        "%s: its own loss is %.5g where next-token cross entropy is %.5g, so it has further terms; its own loss is "
        "used, which computes the logits of all positions",
        *(name, own.item(), expected.item()),
    )
    return False


def _few_positions(row: dict[str, Any]) -> dict[str, Any]:
    """Return some positions of a row, labelled ones among them; all of it if any of its tensors lies otherwise."""
    labels: Tensor = row["labels"]
    tensors = [value for value in row.values() if isinstance(value, Tensor)]
    if labels.shape[1] <= _POSITIONS or any(value.shape != labels.shape for value in tensors):
        return row
    first = int(supervised_positions(labels).any(0).nonzero()[0])
    start = min(max(0, first - _POSITIONS // 2), labels.shape[1] - _POSITIONS)
    some = slice(start, start + _POSITIONS)
    return {name: value[:, some] if isinstance(value, Tensor) else value for name, value in row.items()}


_POSITIONS = 64
"""Positions (count) that are enough to compare losses by: logits of a whole long row take gigabytes."""
_PRECISION = 2e-5
"""Relative and absolute difference (nats) of two float32 means over the same tokens."""


def has_causal_loss(model: nn.Module) -> bool:
    """Return whether the model computes its loss by next-token cross entropy; `OwnLossCheck` tells of further terms."""
    config = getattr(model, "config", None)
    return (
        config is not None
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "output_router_logits", False)  # the experts' balance is part of the loss then
        and getattr(model, "loss_function", None) is ForCausalLMLoss
        and _calls_loss_function(type(model))
    )


def _calls_loss_function(model_class: type) -> bool:
    # Decoders of encoder-decoder families inherit `loss_function` too, and take labels that are shifted already.
    for parent in model_class.__mro__:
        forward = inspect.unwrap(vars(parent)["forward"]) if "forward" in vars(parent) else None
        if forward is not None and "loss_function" in forward.__code__.co_names:
            return True
        if forward is not None and "super" not in forward.__code__.co_names:
            return False
    return False


def supervised_positions(labels: Tensor) -> Tensor:
    """(B, T) labels -> (B, T) bool: true where position t has to predict a labelled token t + 1."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def token_losses(model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (nats) of every supervised token.

    inputs: the forward's keyword arguments, without labels; labels: (B, T), -100 where not supervised.
    Returns ((n,) losses in float32 or wider, row by row, and the (B, T) mask of `supervised_positions`).
    """
    mask = supervised_positions(labels)
    targets = labels[:, 1:][mask[:, :-1]]
    return supervised_losses(model, inputs, mask, targets), mask


def row_sums(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses (n,) and their mask (B, T) -> (summed loss (B,), supervised tokens (B,)) of each row."""
    rows = mask.nonzero()[:, 0].to(losses.device)
    sums = torch.zeros(mask.shape[0], dtype=losses.dtype, device=losses.device)
    return sums.index_add(0, rows, losses), mask.sum(1).to(losses.device)
