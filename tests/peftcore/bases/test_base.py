"""Views of base layers: weight versions, and weights that are parametrised or that a hook computes."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import EXAMPLES, cases_of
from method_example import randomise
from net import Net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from peftcore import LoraConfig, MergeError, PeftModel, get_peft_model
from peftcore.bases import base_weight

LAYERS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": ("linear", lambda: nn.Linear(12, 8), lambda: torch.randn(3, 5, 12)),
    "Conv2d": ("conv", lambda: nn.Conv2d(6, 8, 3), lambda: torch.randn(2, 6, 9, 9)),
    "Embedding": ("embedding", lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (3, 5))),
}
CASES = cases_of(LAYERS)


def adapted(method: str, layer: str) -> tuple[Any, Tensor, Tensor]:
    """(a net whose weight-normed layer is adapted, an input, the base's output)."""
    torch.manual_seed(0)
    _, make, inputs = LAYERS[layer]
    net, x = Net(weight_norm(make())).double(), inputs()
    x = x.double() if x.is_floating_point() else x
    base = net(x).detach()
    net = get_peft_model(net, EXAMPLES[method].make(layer, target_modules=["target"]))
    randomise(net, EXAMPLES[method].spread)
    return net.eval(), x, base


@pytest.mark.parametrize("method, layer", CASES)
def test_a_weight_normed_layer_is_adapted_merged_and_unmerged(method: str, layer: str, tmp_path: Any) -> None:
    net, x, base = adapted(method, layer)
    y = net(x)
    assert (y - base).abs().max() > 1e-3
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    if EXAMPLES[method].merges:
        net.merge_adapter()
        torch.testing.assert_close(net(x), y, rtol=1e-10, atol=1e-10)
        net.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(net).unload(), tmp_path)
    assert torch.equal(loaded(x), net(x))
    with net.disable_adapter():
        assert torch.equal(net(x), base)


@pytest.mark.parametrize("parametrize", [spectral_norm, orthogonal])
def test_what_a_parametrisation_cannot_hold_is_not_merged(parametrize: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    net = get_peft_model(Net(parametrize(nn.Linear(12, 8))).eval(), LoraConfig(target_modules=["target"]))
    randomise(net, 0.3)
    net.eval()
    y = net(x)
    with pytest.raises(MergeError, match="remove_parametrizations"):
        net.merge_adapter()
    assert torch.equal(net(x), y)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes_is_not_merged() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    net = Net(torch.nn.utils.weight_norm(nn.Linear(12, 8)))
    base = net(x).detach()
    net = get_peft_model(net, LoraConfig(target_modules=["target"]))
    randomise(net, 0.3)
    y = net.eval()(x)
    assert (y - base).abs().max() > 1e-3
    with pytest.raises(MergeError, match="remove_weight_norm"):
        net.merge_adapter()
    assert torch.equal(net(x), y)


def test_the_unmerged_weight_and_bias_are_read_from_what_stands_aside() -> None:
    layer = weight_norm(weight_norm(nn.Linear(6, 4)), "bias")
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model: Any = get_peft_model(
        nn.Sequential(OrderedDict(layer=layer)),
        LoraConfig(r=2, target_modules=["layer"], use_dora=True, init_lora_weights=False),
    )
    model.merge_adapter()
    base = model.layer.adapters["default"].base
    assert not torch.allclose(base.read(), weight)
    torch.testing.assert_close(base.read_unmerged(), weight)
    torch.testing.assert_close(base.unmerged_bias, bias)
    model.double()
    assert base.read_unmerged().dtype == torch.float64


def test_a_version_changes_when_the_weight_does() -> None:
    layer = nn.Linear(4, 4)
    base = base_weight(layer)
    version = base.unmerged_version()
    assert version is not None and version == base.unmerged_version()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert version != base.unmerged_version()
    version = base.unmerged_version()
    base.write(base.read().clone())
    assert version != base.unmerged_version()
