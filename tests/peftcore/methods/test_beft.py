"""What the BEFT paper says: only an addition to the bias trains, by default that of the value projections."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_example import Example, randomise
from routed_models import llama
from torch import nn

from peftcore import MergeError, PeftModel, PeftWarning, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.beft import BeftConfig

EXAMPLE = Example(
    BeftConfig,
    needs_bias=True,
    theirs="BeftConfig",
    parity={"plain": {}, "random": {"init_weights": False}},
    families=("llama", "bert", "t5"),
)


def test_the_papers_formula_and_its_merged_bias() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    net: Any = get_peft_model(nn.Sequential(layer), BeftConfig(target_modules=["0"]))
    randomise(net, 0.5)
    change = net[0].adapters["default"].beft_bias.detach()
    assert change.shape == (1, 5) and net.get_nb_trainable_parameters()[0] == 5
    torch.testing.assert_close(net(x), x @ weight.T + bias + change, rtol=1e-12, atol=1e-12)
    merged = net.merge_and_unload()[0]
    assert torch.equal(merged.weight, weight) and torch.equal(merged.bias, bias + change[0])


@pytest.mark.filterwarnings("ignore:BEFT.* has no bias")
def test_the_value_projections_are_the_default() -> None:
    assert set(adapter_set(get_peft_model(llama(), BeftConfig())).layers) == {
        f"model.layers.{number}.self_attn.v_proj" for number in range(len(llama().model.layers))
    }


def test_two_adapters_add_up_and_merge_together() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(4, 6, dtype=torch.float64)
    before = net(x).detach()
    config = BeftConfig(target_modules=["0"], init_weights=False)
    net = get_peft_model(net, config)
    net.add_adapter("other", config)
    net.set_adapter(["default", "other"])
    both = sum(adapter.beft_bias for adapter in net[0].adapters._modules.values())
    torch.testing.assert_close(net(x), before + both, rtol=1e-12, atol=1e-12)
    net.merge_adapter()
    torch.testing.assert_close(net(x), before + both, rtol=1e-12, atol=1e-12)


def test_a_layer_without_a_bias_works_unmerged_and_refuses_to_merge() -> None:
    net, x = nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(4, 6)
    before = net(x).detach()
    with pytest.warns(
        PeftWarning, match=r"BEFT: 0 has no bias \(1 layers in all\), so the adapter .* cannot be merged"
    ):
        net = get_peft_model(net, BeftConfig(target_modules=["0"], init_weights=False))
    adapted = net(x)
    assert torch.equal(adapted, before + net[0].adapters["default"].beft_bias)
    with pytest.raises(MergeError, match="BEFT: 0 has no bias to merge into; keep the adapter unmerged"):
        net.merge_adapter()
    assert torch.equal(net(x), adapted)


def test_options_that_peft_lacks_are_saved_as_paths(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    net = get_peft_model(net, BeftConfig(target_modules=r"\d", exclude_modules=["1"], init_weights=False))
    net.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["0", "2"] and "exclude_modules" not in saved
    x = torch.randn(2, 4)
    expected = net(x)
    assert torch.equal(PeftModel.from_pretrained(net.unload(), tmp_path)(x), expected)
