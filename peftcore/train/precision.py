"""Dynamic loss scaling for models that compute in float16, on any device.

The least positive float16 number is 6e-8, so most gradients of activations would round to zero. The loss is therefore
multiplied by a scale S before the backward pass. The gradients (of adapters in float32) are divided by S before they
are clipped, logged or used. A step whose gradients are not finite is skipped and halves S; 2,000 steps without an
overflow double S. bfloat16 has float32's range and needs no scaling. arXiv:1710.03740.

accelerate scales losses only on GPUs, and only together with autocast, which a float16 model does not need.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftcore.errors import TrainingError


def scale_losses(accelerator: Accelerator, model: nn.Module) -> None:
    """Give the accelerator a gradient scaler if the model computes in float16 (see `computes_in_float16`).

    Call this function before an optimiser is prepared. A scaler that the accelerator already has is kept.

    Raises:
        TrainingError: The losses are scaled, and a trained parameter is in float16, in which gradients overflow. The
            other case is `fp16=True` for a model that does not compute in float16, on a device where accelerate
            scales no losses, such as a CPU.
    """
    if accelerator.scaler is None and computes_in_float16(model):
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    if accelerator.scaler is None:
        if accelerator.mixed_precision == "fp16":
            raise TrainingError(
                f"fp16=True has no effect on {accelerator.device.type} for a model that is not in float16; load the "
                "base in float16 (losses are then scaled automatically), or remove fp16"
            )
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise TrainingError(
                f"{name} is trained in float16, in which gradients overflow; train it in float32 (parameter.float()), "
                "or load the base in bfloat16 or float32"
            )


def computes_in_float16(model: nn.Module) -> bool:
    """Return True if any frozen weight is in float16, or is quantised with float16 as its compute dtype."""
    frozen = any(p.dtype == torch.float16 for p in model.parameters() if not p.requires_grad)
    return frozen or any(getattr(module, "compute_dtype", None) == torch.float16 for module in model.modules())


def unscale_gradients(accelerator: Accelerator, optimizer: Any) -> None:
    """Divide an optimiser's gradients by the loss scale, unless accelerate does. Call once per optimiser step."""
    if accelerator.scaler is not None and not accelerator.native_amp:
        accelerator.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
