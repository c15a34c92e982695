"""Activations that are computed again in the backward pass, so that the forward need not keep them.

    blocks      every transformer block keeps its input alone, and runs once more in the backward. arXiv:1604.06174
    selective   so does every second block; the others keep everything
    offload     as blocks, and the blocks' inputs wait in the CPU's memory, pinned, until the backward comes to them

Recomputation is non-reentrant: gradients pass through a frozen base whatever requires a gradient, and dropout's mask
comes back from the random state that is put back.

Why every second block, and no policy of operations to keep: the fused operation of `peftcore.kernels.low_rank` adds the
adapter's product onto the base's in place, so a kept product has been changed when the backward asks for it, and
PyTorch refuses it. Keeping what attention gives alone saves the backward little and costs a Python call an operation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from peftcore.detection import detect
from peftcore.errors import TrainingError

Mode = Literal["none", "blocks", "selective", "offload"]
MODES: tuple[Mode, ...] = get_args(Mode)
SELECTED = 2
"""Of so many blocks in a row the first is recomputed in `selective`."""

_MARK = "gradient_checkpointing"
"""Attribute that says of a module, to transformers and to prefix tuning, that it recomputes."""


def recompute_activations(model: nn.Module, mode: Mode) -> None:
    """Have the blocks of `model` recompute their activations from now on, in training mode; "none" undoes it.

    Works in place, on any model with repeated blocks, before or after adapters are added, for plain loops and for
    any Trainer. Raises TrainingError for a model without blocks, for "selective" on a model that recomputes all or
    nothing, and for "offload" on a model that lies in the CPU's memory already.
    """
    if mode not in MODES:
        raise TrainingError(f"there is no recomputation mode {mode!r}; give {', '.join(MODES)}")
    if mode == "offload" and not _on_accelerator(model):
        raise TrainingError(
            "offload moves activations from a GPU into the CPU's memory, and this model is there already; use blocks "
            "(least memory) or selective"
        )
    if isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing:
        _switch_own(model, mode)
    else:
        _switch_blocks(model, mode)


def _on_accelerator(model: nn.Module) -> bool:
    return any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters())


def _switch_own(model: PreTrainedModel, mode: Mode) -> None:
    """Use transformers' own switch, which also keeps the blocks from filling a cache twice."""
    model.activation_checkpointing_disable()
    if mode == "none":
        return
    if mode == "selective" and not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise TrainingError(f"the blocks of {type(model).__name__} recompute all or nothing; use blocks")
    every = SELECTED if mode == "selective" else 1
    model.activation_checkpointing_enable({"use_reentrant": False}, every, offload=mode == "offload")


def _switch_blocks(model: nn.Module, mode: Mode) -> None:
    """Give the blocks of a model that knows no recomputation a forward that does."""
    modules = dict(model.named_modules())
    lists = [[modules[path] for path in blocks.paths] for blocks in detect(model).blocks]
    for block in (block for blocks in lists for block in blocks if _recomputes(block)):
        del block.__dict__["forward"], block.__dict__[_MARK]
    if mode == "none":
        return
    chosen = [block for blocks in lists for block in blocks[:: SELECTED if mode == "selective" else 1]]
    if not chosen:
        raise TrainingError(
            f"{type(model).__name__} has no list of repeated blocks to recompute; call torch.utils.checkpoint in it"
        )
    taken = next((block for block in chosen if "forward" in block.__dict__), None)
    if taken is not None:
        raise TrainingError(f"something else has replaced the forward of a {type(taken).__name__} already")
    for block in chosen:
        block.__dict__["forward"] = partial(_recomputed, block, type(block).forward, mode == "offload")
        block.__dict__[_MARK] = True


def _recomputes(block: nn.Module) -> bool:
    own = block.__dict__.get("forward")
    return isinstance(own, partial) and own.func is _recomputed


def _recomputed(block: nn.Module, forward: Callable[..., Any], offload: bool, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *args, **kwargs)
    waiting: AbstractContextManager[Any] = save_on_cpu(pin_memory=True) if offload else nullcontext()
    with waiting:  # holds for the block's inputs alone: what lies within has hooks of its own
        return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
