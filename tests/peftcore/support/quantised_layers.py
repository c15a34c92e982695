"""A linear layer in each storage of quantised weights."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor, nn

from peftcore.bases import GgufLinear
from peftcore.bases.gguf_blocks import FORMATS


def quantised(kind: str) -> Any:
    """64 inputs, 32 outputs, random weights; kind: a bitsandbytes storage, a GGUF type like "Q4_1", or a
    name in `STORAGES`. Skips the test if the package is missing."""
    if kind in STORAGES:
        return STORAGES[kind](nn.Linear(64, 32)).to("cpu")
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


def with_one_nf4_layer(model: Any, path: str = "model.layers.0.mlp.up_proj") -> Any:
    """The model with one of its linear layers in NF4."""
    layer = model.get_submodule(path)
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    model.set_submodule(path, made.to("cpu"))
    return model


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


def _torchao_int8(layer: nn.Linear) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def _torchao_int4(layer: nn.Linear) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(layer, config)
    return layer


def _hqq(layer: nn.Linear) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return hqq.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def _gptq(layer: nn.Linear) -> Any:
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    made = kernels.TorchLinear(4, 32, sym=False, desc_act=False, in_features=64, out_features=32, bias=True)
    made.qzero_format(format=2)
    made.pack_original(layer, *_grid(layer), g_idx=torch.arange(64) // 32)
    return made


def _awq(layer: nn.Linear) -> Any:
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    made = kernels.AwqTorchLinear(4, 32, sym=False, desc_act=False, in_features=64, out_features=32, bias=True)
    made.pack(layer, *_grid(layer))
    made.post_init()
    return made


def _grid(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (outputs, groups of 32 inputs) that hold all weights of a layer in 4 bits."""
    layer.requires_grad_(False)
    groups = layer.weight.view(layer.out_features, -1, 32)
    lowest, highest = groups.amin(-1), groups.amax(-1)
    scales = ((highest - lowest) / 15).half().float()
    return scales, (-lowest / scales).round().clamp(0, 15).to(torch.int32)


STORAGES: dict[str, Callable[[nn.Linear], Any]] = {
    "torchao int8": _torchao_int8,
    "torchao int4": _torchao_int4,
    "hqq": _hqq,
    "gptq": _gptq,
    "awq": _awq,
}
"""Storages of packages other than bitsandbytes and gguf, by name."""
