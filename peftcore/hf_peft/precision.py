"""Dtypes for training with automatic mixed precision."""

import torch
from torch import nn


@torch.no_grad()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen parameters of a model to `dtype`, and the trainable ones to float32.

    Parameters that are stored as integers, such as those of a quantised base, stay as they are.

    Args:
        model: a model with adapters; changed in place.
        dtype: `torch.float16` or `torch.bfloat16`.

    Raises:
        TypeError: `dtype` is not a floating-point type.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be torch.float16 or torch.bfloat16; got {dtype!r:.200}")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
