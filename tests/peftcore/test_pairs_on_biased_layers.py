"""Every ordered pair of methods on a layer with a bias: merging the lower adapter, or both, changes no output."""

from typing import Any

import pytest
import torch
from method_example import examples, randomise
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.registry import methods

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")

EXAMPLES = {method: example for method, example in examples().items() if not example.whole_model and example.merges}
VARIANTS = {
    "DoRA": {"use_dora": True},
    "LoRA with a bias": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "DoRA on PiSSA": {"init_lora_weights": "pissa", "use_dora": True},
}
LINEAR = [name for name in EXAMPLES if "linear" in methods()[name].adapter.layer_kinds] + list(VARIANTS)
CONV = [name for name in EXAMPLES if "conv" in methods()[name].adapter.layer_kinds] + ["DoRA", "LoRA with a bias"]


def config(name: str, layer: str) -> Any:
    if name in VARIANTS:
        return LoraConfig(r=4, target_modules=["target"], **VARIANTS[name])
    return EXAMPLES[name].make(layer, target_modules=["target"])


@pytest.mark.parametrize(
    "layer, lower", [("Linear", lower) for lower in LINEAR] + [("Conv2d", lower) for lower in CONV]
)
def test_merging_changes_no_output(layer: str, lower: str) -> None:
    torch.manual_seed(0)
    net: Any = nn.Module()
    net.target = (nn.Linear(12, 8) if layer == "Linear" else nn.Conv2d(6, 8, 3)).double()
    x = (torch.randn(3, 5, 12) if layer == "Linear" else torch.randn(2, 6, 7, 7)).double()
    net = get_peft_model(net, config(lower, layer), "lower")
    randomise(net, 0.3)
    for upper in LINEAR if layer == "Linear" else CONV:
        if lower == upper == "TRAINABLE_TOKENS":  # both train the same rows whole, which is refused
            continue
        net.add_adapter("upper", config(upper, layer))
        net.set_adapter(["lower", "upper"])
        net.set_requires_grad("lower", False)
        randomise(net, 0.3)
        net.eval()
        with torch.no_grad():
            both = net.target(x)
            for names in (["lower"], ["upper"]):
                net.merge_adapter(names)
                told = f"{upper}, {names}: ".__add__
                torch.testing.assert_close(net.target(x), both, rtol=1e-9, atol=1e-9, msg=told)
            net.unmerge_adapter()
            assert torch.equal(net.target(x), both), upper
        net.delete_adapter("upper")
