"""The causal language-model loss, computed only where a label is.

    loss = -(1/N) Σ_{(b,t): y_{b,t+1} ≠ -100} log softmax(h_{b,t} Wᵀ)[y_{b,t+1}]

The rows of h whose next token nobody supervises never reach the output head (with completions of 15 tokens behind
prompts of 200 and a vocabulary of 49,000, that is most of the head's time), and where the head is a plain linear layer
no logits are kept of the others either; `peftcore.train.supervised_head` says how.

Shapes: B rows, T positions, V vocabulary, n supervised next tokens in the batch.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from peftcore.train.supervised_head import supervised_losses

IGNORED = -100
"""Label of a position that nobody supervises; transformers' and PyTorch's convention."""


def has_causal_loss(model: nn.Module) -> bool:
    """Whether the model's own loss is next-token cross entropy, so that this module computes the same number."""
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
