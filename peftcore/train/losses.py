"""The causal language-model loss, computed only where a label is.

    loss = -(1/N) Σ_{(b,t): y_{b,t+1} ≠ -100} log softmax(h_{b,t} Wᵀ)[y_{b,t+1}]

The rows of h whose next token nobody supervises never reach the output head: with completions of 15 tokens behind
prompts of 200 and a vocabulary of 49,000, that is most of the head's time and nearly all of the loss's memory.

Shapes: B rows, T positions, V vocabulary, n supervised next tokens in the batch.
"""

import inspect
import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

IGNORED = -100
"""Label of a position that nobody supervises; transformers' and PyTorch's convention."""


def has_causal_loss(model: nn.Module) -> bool:
    """Whether the model's own loss is next-token cross entropy, so that this module computes the same number."""
    config = getattr(model, "config", None)
    return (
        config is not None
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(model, "loss_function", None) is ForCausalLMLoss
    )


def supervised_positions(labels: Tensor) -> Tensor:
    """(B, T) labels -> (B, T) bool: true where position t has to predict a labelled token t + 1."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def supervised_logits(model: nn.Module, inputs: Mapping[str, object], mask: Tensor) -> Tensor:
    """Logits (n, V) at the true positions of `mask` (B, T), row by row, in the model's dtype.

    inputs: the forward's keyword arguments, without labels. Models that take `logits_to_keep` compute their head
    at those positions alone; others compute it everywhere, and the rest is dropped.
    """
    forward = getattr(model, "module", model).forward  # DDP's own forward hides the model's signature
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        logits = model(**inputs).logits
        return logits[F.pad(mask, (logits.shape[1] - mask.shape[1], 0))]  # virtual tokens stand before the text
    if _head_takes_a_mask(model):
        return model(**inputs, logits_to_keep=mask).logits
    positions = mask.any(0).nonzero().squeeze(1)  # sorted; some rows' logits there are not wanted
    return model(**inputs, logits_to_keep=positions).logits[mask[:, positions]]


def _head_takes_a_mask(model: nn.Module) -> bool:
    # Models built on this helper of transformers take a (B, T) mask, the few others only positions.
    module = sys.modules.get(type(getattr(model, "module", model)).__module__)
    return hasattr(module, "slice_logits_to_keep")


def token_losses(model: nn.Module, inputs: Mapping[str, object], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (nats) of every supervised token.

    inputs: the forward's keyword arguments, without labels; labels: (B, T), -100 where not supervised.
    Returns ((n,) losses in float32 or wider, row by row, and the (B, T) mask of `supervised_positions`).
    """
    mask = supervised_positions(labels)
    targets = labels[:, 1:][mask[:, :-1]]
    logits = supervised_logits(model, inputs, mask)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none"), mask


def row_sums(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token losses (n,) and their mask (B, T) -> (summed loss (B,), supervised tokens (B,)) of each row."""
    rows = mask.nonzero()[:, 0].to(losses.device)
    sums = torch.zeros(mask.shape[0], dtype=losses.dtype, device=losses.device)
    return sums.index_add(0, rows, losses), mask.sum(1).to(losses.device)
