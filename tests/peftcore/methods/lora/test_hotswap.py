"""Enlarging a LoRA layer adds components that are zero, in each layout of A and B."""

from pathlib import Path

import pytest
import torch
from lora_nets import LAYERS, adapter, lora, net_and_input
from torch import nn

from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.errors import HotswapError
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora import Lora
from peftcore.methods.lora.hotswap import check_rank, clear, enlarge, rank_of, use_tensor_scaling
from peftcore.storage.hotswap import prepare_model_for_compiled_hotswap


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_a_larger_rank_is_the_same_function(layer: str, options: dict[str, bool]) -> None:
    net, x = net_and_input(layer)
    net = lora(net, init_lora_weights=False, **options)
    before = net(x)
    enlarge(adapter(net), 7)
    assert adapter(net).lora_A_weight.shape[0] == adapter(net).lora_B_weight.shape[1] == adapter(net).r == 7
    torch.testing.assert_close(net(x), before)
    with torch.no_grad():
        torch.testing.assert_close(net(x), before)


def test_an_adapter_with_a_subtracted_start_can_be_saved_after_it_was_enlarged(tmp_path: Path) -> None:
    net, x = net_and_input("linear")
    net = lora(net, init_lora_weights="pissa")
    with torch.no_grad():
        adapter(net).lora_B_weight.add_(torch.randn_like(adapter(net).lora_B_weight))
    before = net(x)
    prepare_model_for_compiled_hotswap(net, target_rank=4)
    torch.testing.assert_close(net(x), before)
    net.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net.unload(), tmp_path)(x), before)


def test_experts_and_groups_have_blocks_of_their_own() -> None:
    torch.manual_seed(0)
    net = nn.Module()
    net.experts = nn.Module()
    net.experts.weight = nn.Parameter(torch.randn(3, 4, 5))
    config = LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[], init_lora_weights=False)
    model = get_peft_model(net, config)
    (part,) = adapter_set(model).of_method("default").values()
    assert isinstance(part, Lora)
    change = part.delta_weight()
    enlarge(part, 5)
    torch.testing.assert_close(part.delta_weight(), change)

    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    x = torch.randn(2, 4, 5, 5).double()
    model = lora(grouped, r=4, init_lora_weights=False)
    before = model(x)
    enlarge(adapter(model), 6)
    torch.testing.assert_close(model(x), before)
    with pytest.raises(HotswapError, match="target_rank=7 is not a multiple of the 2 groups of 0; try 8"):
        check_rank(adapter(model), 7, "0")


def test_the_rank_of_other_tensors() -> None:
    part = adapter(lora(nn.Sequential(nn.Linear(6, 5))))
    assert rank_of(part, {"lora_A.weight": torch.zeros(9, 6), "lora_B.weight": torch.zeros(5, 9)}) == 9
    assert rank_of(part, {"lora_A.weight": torch.zeros(9, 6), "lora_B.weight": torch.zeros(5, 8)}) is None
    assert rank_of(part, {"lora_A.weight": torch.zeros(9, 7), "lora_B.weight": torch.zeros(5, 9)}) is None


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_a_cleared_layer_computes_what_its_base_does(options: dict[str, bool]) -> None:
    net, x = net_and_input("linear")
    expected = net(x)
    net = lora(net, init_lora_weights=False, **options)
    if options.get("lora_bias"):
        nn.init.normal_(adapter(net).lora_bias)
    assert not torch.allclose(net(x), expected)
    clear(adapter(net))
    torch.testing.assert_close(net(x), expected)


def test_a_number_that_is_assigned_changes_the_tensor() -> None:
    part = adapter(lora(nn.Sequential(nn.Linear(6, 5))))
    use_tensor_scaling(part)
    scaling, changes = part.scaling, part.changes
    part.scaling = 0.5
    assert part.scaling is scaling
    assert scaling.item() == 0.5
    assert part.changes > changes, "caches must notice the new scaling"
