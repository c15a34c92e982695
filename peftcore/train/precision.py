"""Dynamic loss scaling for models that compute in float16, on any device.

float16 ends at 6e-8: most gradients of activations would be zero in it. So the loss is multiplied by a scale S before
the backward pass, and the gradients (of the adapters, which are in float32) are divided by it before they are clipped,
stepped with or looked at. A step whose gradients are not finite is left out and halves S; 2,000 steps without one
double it. bfloat16 has float32's range and needs none of this.

accelerate scales losses by itself on GPUs alone, and only together with autocast, which a model that is in float16
already has no use for. arXiv:1710.03740.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftcore.errors import TrainingError


def scale_losses(accelerator: Accelerator, model: nn.Module) -> None:
    """Give the accelerator, before it prepares an optimiser, a gradient scaler if the model computes in float16.

    Raises TrainingError if float16 is asked for on a CPU for a model that is not in it, or for a parameter that trains
    in float16, whose gradients overflow as activations do.
    """
    if accelerator.scaler is None and computes_in_float16(model):
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    if accelerator.scaler is None:
        if accelerator.mixed_precision == "fp16":
            raise TrainingError(
                f"fp16=True has no effect on {accelerator.device.type} for a model that is not in float16; load the "
                "base in float16 (its losses are then scaled by themselves), or leave fp16 out"
            )
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} trains in float16, in which its gradients overflow; train it in float32 (parameter.float()), "
                "or load the base in bfloat16 or float32"
            )


def computes_in_float16(model: nn.Module) -> bool:
    """Whether any frozen weight is in float16, or is quantised and multiplied in it."""
    frozen = any(p.dtype == torch.float16 for p in model.parameters() if not p.requires_grad)
    return frozen or any(getattr(module, "compute_dtype", None) == torch.float16 for module in model.modules())


def unscale_gradients(accelerator: Accelerator, optimizer: Any) -> None:
    """Divide an optimiser's gradients by the scale of the loss; once a step, where accelerate does not do it."""
    if accelerator.scaler is not None and not accelerator.native_amp:
        accelerator.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
