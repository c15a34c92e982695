"""A linear layer in each of bitsandbytes' storages and in GGUF blocks."""

from typing import Any

import bitsandbytes as bnb
import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor, nn

from peftcore.bases import GgufLinear
from peftcore.bases.gguf_blocks import FORMATS


def quantised(kind: str) -> Any:
    """64 inputs, 32 outputs, random weights; kind: "nf4", "nf4+double", "fp4", "int8", or a GGUF type like "Q4_1"."""
    layer = nn.Linear(64, 32)
    if kind in FORMATS:
        rows = quantize(layer.weight.detach().numpy(), gguf.GGMLQuantizationType[kind])
        return gguf_linear(kind, torch.from_numpy(rows), layer.bias)
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    else:
        storage, _, double = kind.partition("+")
        made = bnb.nn.Linear4bit(
            64, 32, quant_type=storage, compress_statistics=bool(double), compute_dtype=torch.float32
        )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def gguf_linear(kind: str, rows: Tensor, bias: Tensor | None = None) -> GgufLinear:
    """A layer with the rows of a GGUF file."""
    block = FORMATS[kind]
    layer = GgufLinear(rows.shape[1] // block.size * block.weights, len(rows), kind, bias is not None)
    layer.weight.data.copy_(block.pack(rows))
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer


def random_rows(kind: str, outputs: int, inputs: int) -> Tensor:
    """Rows of random blocks, with finite scales."""
    block, draw = FORMATS[kind], np.random.default_rng(0)
    raw = draw.integers(0, 256, (outputs, inputs // block.weights, block.size), dtype=np.uint8)
    scales = (208,) if kind == "Q6_K" else (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    for first in scales:
        raw[:, :, first : first + 2] = draw.normal(size=(*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(outputs, -1))
