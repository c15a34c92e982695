"""PyTorch's fused encoder path is disabled while a module inside is wrapped, and enabled again afterwards."""

from typing import Any

import torch
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.torch_encoders import update_fused_paths
from peftcore.layers.active import Selection
from peftcore.layers.wrapper import LayerWrapper


def test_an_encoder_layer_computes_with_its_adapter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)).eval()
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, net(x).detach())
    with net.disable_adapter(), torch.no_grad():
        assert (net(x) - fast).abs().max() > 1e-4


def test_an_encoder_stays_unfused_while_any_adapter_is_inside() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(block, 2).eval(), LoraConfig(r=2, target_modules=["0.linear1"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0.linear2", "1.linear1"]))
    switches = [[model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)]]
    for name in ("b", "default"):
        model.delete_adapter(name)
        switches.append([model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)])
    assert switches == [[False, 0, 0], [False, 0, 1], [True, 1, 1]]


def test_an_encoder_beside_the_adapted_one_stays_fused() -> None:
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
    model: Any = get_peft_model(nn.Sequential(*blocks), LoraConfig(r=2, target_modules=["1.linear1"]))
    assert [block.activation_relu_or_gelu for block in model] == [1, 0]


def test_a_setting_of_the_user_comes_back() -> None:
    """An encoder without nested tensors, and a layer with an activation that PyTorch cannot fuse."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=nn.functional.silu)
    encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
    before = [encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu]
    model: Any = get_peft_model(encoder, LoraConfig(r=2, target_modules=["linear1"])).unload()
    assert [model.use_nested_tensor, model.layers[0].activation_relu_or_gelu] == before == [False, 0]


def test_a_wrapper_around_an_encoder_is_not_inside_of_it() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    index = ModuleIndex(nn.ModuleDict({"encoder": encoder, "encoder_head": nn.Linear(2, 2)}))
    index.replace(index.modules["encoder_head"], LayerWrapper(nn.Linear(2, 2), Selection()))
    update_fused_paths(index)
    assert encoder.activation_relu_or_gelu == 1
