"""Initialisations that subtract their start from the base: outputs, the base and saving."""

import copy
from typing import Any

import peft
import pytest
import torch
from lora_nets import adapter, lora, net_and_input
from method_example import randomise
from torch import nn

from peftcore import ConfigError, LoraConfig, PeftModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle warns about its own deprecated calls


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora", "OLoRA"])
def test_a_start_taken_out_of_the_base_changes_no_output_and_no_base(start: str, tmp_path: Any) -> None:
    net, x = net_and_input("linear")
    plain, base = copy.deepcopy(net), net(x)
    net = lora(net, init_lora_weights=start)
    torch.testing.assert_close(net(x), base, rtol=1e-6, atol=1e-6)
    assert torch.equal(net[0].base_layer.weight, plain[0].weight)  # type: ignore[index]
    assert adapter(net).lora_B_weight.abs().max() > 0.1  # and yet the adapter holds the weight's main part
    net(x).square().sum().backward()
    assert adapter(net).lora_A_weight.grad.abs().max() > 0
    randomise(net, 0.3)
    adapted = net(x)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.peft_config["default"].r == 4 and loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(loaded(x), adapted, rtol=1e-6, atol=1e-6)
    again = lora(copy.deepcopy(plain), init_lora_weights=start)
    again.load_adapter_weights(tmp_path)  # as a resumed training does: the same factors, not a wider adapter
    assert torch.equal(adapter(again).lora_A_weight, adapter(net).lora_A_weight) and torch.equal(again(x), net(x))
    assert torch.equal(net.unload()(x), base)


def test_a_start_is_saved_with_the_same_scale_whatever_gives_it(tmp_path: Any) -> None:
    """Twice the rank: α is doubled, and under the root of rsLoRA only √2-fold; patterns follow."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    patterns: dict[str, Any] = {"rank_pattern": {"1": 3}, "alpha_pattern": {"1": 5}}
    for number, options in enumerate(({"use_rslora": True}, patterns, {"use_rslora": True, **patterns})):
        net = lora(copy.deepcopy(plain), target_modules=["0", "1"], init_lora_weights="pissa", **options)
        randomise(net, 0.3)
        net.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(number))
        there = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / str(number))).eval()
        for read in (loaded, there):
            torch.testing.assert_close(read(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_rank_beyond_the_weight_is_refused_before_anything_changes() -> None:
    net, _ = net_and_input("linear")
    with pytest.raises(ConfigError, match="exceeds the weight's 5"):
        lora(net, r=6, init_lora_weights="pissa")
    assert type(net[0]) is nn.Linear  # type: ignore[index]


def test_other_adapters_see_the_true_base() -> None:
    net, x = net_and_input("linear")
    base = net(x)
    net = lora(net, init_lora_weights="pissa")
    net.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    net.set_adapter("plain")
    assert torch.equal(net(x), base)
