"""Plain layers in place of quantised ones; test_dequantize.py of injection has such layers with adapters."""

from typing import Any

import torch
from quantised_layers import quantised
from torch import nn

from peftcore.bases import base_weight
from peftcore.bases.dequantize import replace_quantized


def test_a_layer_with_two_paths_stays_one_layer_and_plain_layers_stay() -> None:
    shared, plain = quantised("nf4"), nn.Linear(32, 64)
    model: Any = nn.Sequential(shared, plain, shared)
    x = torch.randn(3, 64)
    expected = model(x)
    replace_quantized(model, {str(i): base_weight(layer) for i, layer in enumerate(model)}, None)
    assert type(model[0]) is nn.Linear and model[0] is model[2]
    assert model[1] is plain
    torch.testing.assert_close(model(x), expected)


def test_a_model_without_quantised_layers_stays_as_it_is() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    layer = model[0]
    replace_quantized(model, {"0": base_weight(layer)}, torch.bfloat16)
    assert model[0] is layer and layer.weight.dtype == torch.float32
