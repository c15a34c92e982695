"""GPTQ's and AWQ's layers of gptqmodel: read as they multiply; a weight that is merged into them is refused."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from quantised_layers import quantised
from torch import nn

from peftcore import BeftConfig, LoraConfig, MergeError, TargetError, check_mergeable, get_peft_model
from peftcore.bases import base_weight

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the package takes seconds to import
if find_spec("gptqmodel") is None:
    pytest.skip("could not find gptqmodel", allow_module_level=True)


@pytest.mark.parametrize("kind, dtype", [("gptq", torch.float32), ("gptq", torch.float16), ("awq", torch.float16)])
def test_the_weight_is_read_as_the_layer_multiplies_it(kind: str, dtype: torch.dtype) -> None:
    layer = quantised(kind).eval()
    x, base = torch.randn(5, 64).to(dtype), base_weight(layer)
    expected = nn.functional.linear(x, base.read().to(dtype), layer.bias.to(dtype))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(layer(x), expected, **close)
    torch.testing.assert_close(base.product(x), expected, **close)


@pytest.mark.parametrize("kind, advice", [("gptq", "backend='gptq_torch'"), ("awq", "backend='torch_awq'")])
def test_another_kernel_is_refused_with_the_one_that_fits(kind: str, advice: str) -> None:
    layer: Any = quantised(kind)
    layer.__class__ = type("MarlinLinear", (type(layer),), {"__module__": type(layer).__module__})
    with pytest.raises(TargetError, match=rf"q is a MarlinLinear.*{advice}"):
        base_weight(layer, "q")


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_merging_a_weight_is_refused_and_a_bias_is_merged(kind: str) -> None:
    model = get_peft_model(nn.Sequential(quantised(kind)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(MergeError, match=r"0: adapter 'default'.*needs data.*dequantize_base"):
        check_mergeable(model, ["default"])
    model = get_peft_model(nn.Sequential(quantised(kind)), BeftConfig(target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    x = torch.randn(3, 64)
    adapted, bias = model(x), model[0].base_layer.bias
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert model[0].base_layer.bias is bias
