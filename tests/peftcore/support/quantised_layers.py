"""A linear layer in each storage of quantised weights."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn


def quantised(kind: str) -> Any:
    """64 inputs, 32 outputs, random weights; kind: a name in `STORAGES`. Skips the test if the package is missing."""
    if kind in STORAGES:
        return STORAGES[kind](nn.Linear(64, 32)).to("cpu")
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


STORAGES: dict[str, Callable[[nn.Linear], Any]] = {
    "torchao int8": _torchao_int8,
    "torchao int4": _torchao_int4,
    "hqq": _hqq,
}
"""Storages of other packages than bitsandbytes, by name."""
