"""torchao's weights: read as their layer multiplies them, and written in the same form."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import LoraConfig, TargetError, get_peft_model
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


ROUNDING = {
    "int8 dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    "int8 dynamic, few bits": lambda: quantization.Int8DynamicActivationIntxWeightConfig(),
}


@pytest.mark.parametrize("kind", ROUNDING)
def test_an_adapter_on_rounded_inputs_adds_to_the_layers_own_output(kind: str) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    quantization.quantize_(net, ROUNDING[kind]())
    x = torch.randn(5, 64, requires_grad=True)
    base, weight = net[0](x.detach()), base_weight(net[0]).read()
    assert not torch.allclose(base, nn.functional.linear(x, weight, net[0].bias), atol=1e-4), "inputs are rounded"
    model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer: Any = model[0]
    change = layer.get_delta_weight("default").detach()
    for training in (True, False):
        y = model.train(training)(x)
        torch.testing.assert_close(y, base + x @ change.T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weight + change).sum(0).expand_as(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("kind", ROUNDING)
def test_a_merge_keeps_the_rounding_of_inputs(kind: str) -> None:
    torch.manual_seed(0)
    layer, dense = nn.Linear(64, 32), torch.randn(32, 64)
    wanted = copy.deepcopy(layer)
    wanted.weight = nn.Parameter(dense.clone())
    for each in (layer, wanted):
        quantization.quantize_(each, ROUNDING[kind]())
    base_weight(layer).write(dense)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), wanted(x))


def test_scaled_inputs_are_refused() -> None:
    layer = quantised("int8 per row")
    layer.weight.act_pre_scale = torch.ones(64)
    with pytest.raises(TargetError, match=r"Int8Tensor with scaled inputs; .*Int8WeightOnlyConfig"):
        base_weight(layer)
