"""HQQ's layers: read as they multiply, and put back with their scales after a merge."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.bases import base_weight

library: Any = pytest.importorskip("hqq.core.quantize")


def quantised(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = library.BaseQuantizeConfig(**{"nbits": 4, "group_size": 32, "axis": 1, **options})
    return library.HQQLinear(nn.Linear(64, 32), config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_the_weight_is_read_as_the_layer_multiplies_it(bits: int, axis: int) -> None:
    layer, x = quantised(nbits=bits, axis=axis), torch.randn(5, 64)
    expected = nn.functional.linear(x, base_weight(layer).read(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(base_weight(layer).product(x), expected)


def test_a_weight_is_written_as_hqq_quantises_it() -> None:
    base = base_weight(quantised())
    linear = nn.Linear(64, 32)
    dense = linear.weight.detach().clone()
    other = library.HQQLinear(linear, base.layer.quant_config | {"offload_meta": False}, True, torch.float32, "cpu")
    before, state = base.read(), base.state()
    base.write(dense)
    assert torch.equal(base.read(), base_weight(other).read()) and not torch.equal(base.read(), before)
    assert torch.equal(base.read_from(state), before), "the state from before still has its own scales"
    base.restore(state)
    assert torch.equal(base.read(), before) and base.layer.meta is state["meta"]


def test_a_bias_that_hqq_has_cast_holds_no_graph() -> None:
    layer = quantised(torch.bfloat16)
    assert layer.bias.requires_grad  # of the layer that was quantised
    base = base_weight(layer)
    assert not layer.bias.requires_grad and base.compute_dtype(torch.ones(1, 64).bfloat16()) == torch.bfloat16


def test_adapters_have_the_dtype_of_the_layer_if_asked() -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(quantised(torch.bfloat16)), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
