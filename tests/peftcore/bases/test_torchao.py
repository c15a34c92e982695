"""torchao's weights: read as their layer multiplies them, and written in the same form."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore import TargetError
from peftcore.bases import base_weight

quantization: Any = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8 per row": lambda: quantization.Int8WeightOnlyConfig(set_inductor_config=False),
    "int8 per group": lambda: int8(quantization.PerGroup(16)),
    "int8 per tensor": lambda: int8(quantization.PerTensor()),
    "int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)),
    "int2": lambda: quantization.IntxWeightOnlyConfig(torch.int2, quantization.PerAxis(0)),
    "int4 asymmetric": lambda: quantization.IntxWeightOnlyConfig(
        torch.int4, quantization.PerGroup(32), quantization.MappingType.ASYMMETRIC
    ),
}


def int8(granularity: Any) -> Any:
    return quantization.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)


def quantised(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).to(dtype).requires_grad_(False)
    quantization.quantize_(layer, CONFIGS[kind]())
    return layer


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weight_is_read_as_the_layer_multiplies_it(kind: str) -> None:
    layer, x = quantised(kind), torch.randn(5, 64)
    expected = nn.functional.linear(x, base_weight(layer).read(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(base_weight(layer).product(x), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_weight_is_written_as_torchao_quantises_it(kind: str) -> None:
    layer = quantised(kind)
    torch.manual_seed(1)
    dense, wanted = torch.randn(32, 64), nn.Linear(64, 32)
    wanted.weight = nn.Parameter(dense.clone(), requires_grad=False)
    quantization.quantize_(wanted, CONFIGS[kind]())
    before = layer.weight
    base_weight(layer).write(dense)
    assert type(layer.weight) is type(before) and layer.weight is not before
    assert torch.equal(layer.weight.qdata, wanted.weight.qdata)
    assert torch.equal(base_weight(layer).read(), base_weight(wanted).read())


def test_int8_is_read_in_float32_and_multiplies_any_input() -> None:
    base = base_weight(quantised("int8 per row", torch.bfloat16))
    assert base.read().dtype == torch.float32 and base.activation_dtype == torch.bfloat16
    assert base.compute_dtype(torch.ones(1, 64)) == torch.float32
    assert base_weight(quantised("int4", torch.bfloat16)).compute_dtype(torch.ones(1, 64)) is None


def test_rounded_inputs_are_refused() -> None:
    layer = nn.Linear(64, 32)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with pytest.raises(TargetError, match=r"Int8Tensor with rounded or scaled inputs; .*Int8WeightOnlyConfig"):
        base_weight(layer)
