"""A base whose weights come after the adapters, on the meta device or not, and inputs without a row."""

import itertools
from typing import Any

import pytest
import torch
from contract_cases import EXAMPLES, cases_of
from method_example import randomise
from net import Net
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora.variants.dora import row_lengths

LAYERS: dict[str, tuple[str, Any, Any]] = {
    "Linear": ("linear", lambda: nn.Linear(12, 8), lambda: torch.randn(2, 5, 12)),
    "Conv2d": ("conv", lambda: nn.Conv2d(6, 8, 3), lambda: torch.randn(2, 6, 9, 9)),
    "Embedding": ("embedding", lambda: nn.Embedding(20, 8), lambda: torch.randint(0, 20, (2, 5))),
    "LayerNorm": ("norm", lambda: nn.LayerNorm(12), lambda: torch.randn(2, 5, 12)),
}
CASES = cases_of(LAYERS)
DORA = pytest.param("DoRA", "Linear", id="DoRA-Linear")


def net_of(layer: str) -> Net:
    return Net(LAYERS[layer][1]().double())


def adapted(method: str, layer: str) -> Any:
    dora = LoraConfig(target_modules=["target"], r=4, use_dora=True)
    config = dora if method == "DoRA" else EXAMPLES[method].make(layer, target_modules=["target"])
    return get_peft_model(net_of(layer), config)


def trained(method: str, layer: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    net = adapted(method, layer)
    randomise(net, 0.3)
    for adapter in adapter_set(net).adapters("default").values():
        adapter.eval()
    x = LAYERS[layer][2]()
    return net, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("method, layer", [*CASES, DORA])
def test_a_state_dict_holds_all_that_a_model_computes_with(method: str, layer: str) -> None:
    for meta, assign in itertools.product((False, True), repeat=2):
        net, x = trained(method, layer)
        torch.manual_seed(1)
        if meta:
            with torch.device("meta"):
                base = net_of(layer)
            other = get_peft_model(base, net.peft_config["default"])
            other.to_empty(device="cpu")
        else:
            other = adapted(method, layer)
            with torch.no_grad():
                other(x)  # what may be kept of the first weights is kept now
        other.load_state_dict(net.state_dict(), assign=assign)
        other.eval()
        torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", ["in place", "another parameter"])
def test_dora_follows_a_base_weight_that_changes(change: str) -> None:
    net, x = trained("DoRA", "Linear")
    net(x)
    layer = net.target.base_layer
    with torch.no_grad():
        if change == "in place":
            layer.weight.mul_(2)
        else:
            layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    y = net(x)
    net.merge_adapter()
    torch.testing.assert_close(net(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method, layer", [case for case in [*CASES, DORA] if case.values[1] != "Conv2d"])
def test_inputs_without_a_row_pass(method: str, layer: str) -> None:
    net, x = trained(method, layer)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            whole = net(x)
            for empty in (x[:, :0], x[:0]):
                assert net(empty).shape == (*empty.shape[:2], whole.shape[-1])


def test_dora_follows_a_base_weight_whose_memory_comes_back() -> None:
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(64, 32)), LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    )
    x, weight = torch.randn(3, 64), model[0].base_layer.weight
    for _ in range(10):
        model(x)
        weight.data = torch.randn(32, 64)
        weight.data = torch.randn(32, 64)  # often where the first one was
        adapter = model[0].adapters["default"]
        torch.testing.assert_close(row_lengths(adapter), (adapter.base.read() + adapter.delta_weight()).norm(dim=1))
