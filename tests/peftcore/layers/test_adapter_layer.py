"""f_k(x) = after_k(x, f_{k-1}(before_k(x))): the chain of adapters at one layer, and what its wrapper lets see."""

import copy
from typing import Any

import pytest
import torch
from method_example import randomise
from net import Net
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.methods.hra import HRAConfig
from peftcore.methods.ia3 import IA3Config
from peftcore.methods.loha import LoHaConfig

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["target"]),
    "hra": HRAConfig(r=2, target_modules=["target"]),  # changes the input
    "ia3": IA3Config(target_modules=["target"], feedforward_modules=[]),  # scales the output
    "loha": LoHaConfig(r=2, target_modules=["target"]),  # adds ΔW x
}


def model_of(layer: nn.Module, *names: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Net(layer), CONFIGS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    for name in names:
        model.set_requires_grad(name)
    randomise(model, 0.3)
    return model.double().eval()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("order", [("lora", "hra", "ia3"), ("ia3", "loha", "lora"), ("hra", "lora", "loha")])
def test_a_chain_nests_in_the_order_of_the_names(order: tuple[str, ...], gradients: bool) -> None:
    model = model_of(nn.Linear(12, 8), *order)
    model.set_adapter(list(order))
    adapters = {name: adapter_set(model).adapters(name)["target"] for name in order}

    def chain(count: int, x: Tensor) -> Tensor:
        if not count:
            return model.target.base_layer(x)
        adapter = adapters[order[count - 1]]
        return adapter.after(x, chain(count - 1, adapter.before(x)))

    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(X), chain(len(order), X))


def test_the_remembered_chain_follows_every_change_of_the_layer() -> None:
    """After each change the layer uses the same adapters as one that remembers nothing."""
    model = model_of(nn.Linear(12, 8), "lora", "loha")
    layer = model.target

    def replace() -> None:
        other = copy.deepcopy(layer.adapters["loha"])
        randomise(other, 0.3)
        layer.set_submodule("adapters.loha", other)

    changes = {
        "switch": lambda: model.set_adapter("loha"),
        "both": lambda: model.set_adapter(["lora", "loha"]),
        "merge": lambda: model.merge_adapter(["lora"]),
        "unmerge": model.unmerge_adapter,
        "replace": replace,
        "add": lambda: model.add_adapter("ia3", CONFIGS["ia3"]),
        "switch to the new one": lambda: model.set_adapter(["ia3", "loha"]),
        "delete": lambda: model.delete_adapter("loha"),
    }
    with torch.no_grad():
        model(X)
        for change, make in changes.items():
            make()
            layer(X.to(layer.base_layer.weight.dtype))
            expected = layer.in_order(layer.selection.now)
            remembered = layer.chain(layer.selection.now)
            assert [id(each) for each in remembered] == [id(each) for each in expected], change
        twin = copy.deepcopy(model).target
        assert all(own is not other for own, other in zip(twin.chain(("ia3",)), layer.chain(("ia3",)), strict=True))


@pytest.mark.parametrize("names", [("hra",), ("hra", "lora"), ("lora", "hra")])
def test_a_weight_space_forward_is_the_layer_with_its_merged_weight(names: tuple[str, ...]) -> None:
    """HRA reflects the patches of a convolution, so all adapters up to it change the weight."""
    torch.manual_seed(0)
    model = get_peft_model(Net(nn.Conv2d(6, 8, 3)), CONFIGS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    randomise(model, 0.3)
    model.set_adapter(list(names))
    model.double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    layer = model.target
    weight = layer.base_layer.weight
    for name in names:
        weight = adapter_set(model).adapters(name)["target"].merged_weight(weight)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, layer.base_layer.bias))


def test_models_read_the_base_layers_attributes_through_the_wrapper() -> None:
    model = model_of(nn.Linear(12, 8), "lora")
    layer = model.target
    assert isinstance(layer, AdapterLayer)
    assert layer.in_features == 12 and layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layer.no_such_name
