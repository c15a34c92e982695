"""Activation checkpointing: activations are recomputed in the backward pass instead of kept. arXiv:1604.06174.

    blocks      every transformer block keeps only its input, and runs again in the backward
    selective   every second block does; the others keep their activations
    offload     as blocks; the blocks' inputs are moved to pinned CPU memory until the backward needs them

Checkpointing is non-reentrant, so gradients pass through a frozen base. The random state is restored, so the dropout
mask is the same in both passes.

`selective` skips blocks instead of operations, because the fused operation of `peftcore.kernels.low_rank` adds the
adapter's output to the base's in place. PyTorch refuses such a changed tensor in the backward. Keeping attention
outputs alone saves little time, and costs a Python call per operation.
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
"""`selective` recomputes one block in each group of this many successive blocks."""

_MARK = "gradient_checkpointing"
"""Attribute by which transformers and prefix tuning recognise a module that recomputes."""


def recompute_activations(model: nn.Module, mode: Mode) -> None:
    """Set activation checkpointing of a model's blocks in training mode, in place.

    Works before or after adapters are added, in plain training loops and in any Trainer.

    Args:
        model: A model with repeated blocks.
        mode: "blocks", "selective", "offload", or "none" to switch recomputation off.

    Raises:
        TrainingError: The model has no repeated blocks, "selective" is used with a model that can only recompute all
            blocks, or "offload" with a model in CPU memory.
    """
    if mode not in MODES:
        raise TrainingError(f"unknown recomputation mode {mode!r}; give one of {', '.join(MODES)}")
    if mode == "offload" and not _on_accelerator(model):
        raise TrainingError(
            "offload moves activations from a GPU to CPU memory, and this model is already in CPU memory; use blocks "
            "(least memory) or selective"
        )
    if isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing:
        _switch_transformers(model, mode)
    else:
        _switch_blocks(model, mode)


def _on_accelerator(model: nn.Module) -> bool:
    return any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters())


def _switch_transformers(model: PreTrainedModel, mode: Mode) -> None:
    """Use transformers' own switch, which also prevents that blocks fill a cache twice."""
    model.activation_checkpointing_disable()
    if mode == "none":
        return
    if mode == "selective" and not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise TrainingError(f"{type(model).__name__} can only recompute all of its blocks; use blocks")
    every = SELECTED if mode == "selective" else 1
    model.activation_checkpointing_enable({"use_reentrant": False}, every, offload=mode == "offload")


def _switch_blocks(model: nn.Module, mode: Mode) -> None:
    """Replace the forward of each block in a model without a switch of its own."""
    modules = dict(model.named_modules())
    lists = [[modules[path] for path in blocks.paths] for blocks in detect(model).blocks]
    for block in (block for blocks in lists for block in blocks if _recomputes(block)):
        del block.__dict__["forward"], block.__dict__[_MARK]
    if mode == "none":
        return
    recomputed = [block for blocks in lists for block in blocks[:: SELECTED if mode == "selective" else 1]]
    if not recomputed:
        raise TrainingError(
            f"{type(model).__name__} has no list of repeated blocks; call torch.utils.checkpoint in its code"
        )
    taken = next((block for block in recomputed if "forward" in block.__dict__), None)
    if taken is not None:
        raise TrainingError(f"the forward of a {type(taken).__name__} has already been replaced by other code")
    for block in recomputed:
        block.__dict__["forward"] = partial(_recomputed, block, type(block).forward, mode == "offload")
        block.__dict__[_MARK] = True


def _recomputes(block: nn.Module) -> bool:
    forward = block.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _recomputed


def _recomputed(block: nn.Module, forward: Callable[..., Any], offload: bool, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *args, **kwargs)
    offloading: AbstractContextManager[Any] = save_on_cpu(pin_memory=True) if offload else nullcontext()
    with offloading:  # applies to the block's inputs only; checkpoint installs other hooks inside the block
        return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
