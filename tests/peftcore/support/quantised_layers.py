"""A linear layer in each of bitsandbytes' storages."""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


def quantised(kind: str) -> Any:
    """64 inputs, 32 outputs, random weights; kind: "nf4", "nf4+double", "fp4" or "int8"."""
    layer = nn.Linear(64, 32)
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    else:
        storage, _, double = kind.partition("+")
        made = bnb.nn.Linear4bit(
            64, 32, quant_type=storage, compress_statistics=bool(double), compute_dtype=torch.float32
        )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")
