"""f_k(x) = after_k(x, f_{k-1}(before_k(x))): the chain of adapters at one layer, and what its wrapper lets see."""

import copy
from typing import Any

import peft
import pytest
import torch
from method_example import randomise
from net import Net
from torch import Tensor, nn

import peftcore
from peftcore import AdapterNameError, LoraConfig, RoutingError, get_peft_model
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


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Embedding(6, 4), nn.Conv2d(2, 3, 2)], ids=type)
def test_a_layer_takes_one_adapter_name_for_each_row_as_in_peft(layer: nn.Module, gradients: bool) -> None:
    inputs = {"Linear": torch.randn(4, 5, 4), "Embedding": torch.arange(8).reshape(4, 2) % 6}
    x = inputs.get(type(layer).__name__, torch.randn(4, 2, 3, 3))
    outputs, models = [], []
    for library in (peft, peftcore):
        model = library.get_peft_model(Net(copy.deepcopy(layer)), library.LoraConfig(r=2, target_modules=["target"]))
        model.add_adapter("other", library.LoraConfig(r=3, target_modules=["target"]))
        models.append(model)
    theirs, ours = models
    with torch.no_grad():
        for name in ("default", "other"):
            state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
            values = {key: torch.randn_like(value) for key, value in state.items()}
            peft.set_peft_model_state_dict(theirs, values, name)
            peftcore.set_peft_model_state_dict(ours, values, name)
    names = ["default", "__base__", "other", "default"]
    with torch.set_grad_enabled(gradients):
        for model in models:
            target = model.base_model.model.target
            outputs.append(target(x, adapter_names=names))
            outputs.append(target(x, adapter_names=None))
            with model.disable_adapter():
                outputs.append(target(x, adapter_names=names))
    for theirs_y, ours_y in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(ours_y, theirs_y)
    with pytest.raises(RoutingError, match="1 adapter names for a batch of 4 rows"):
        ours.target(x, adapter_names=["default"])
    with pytest.raises(AdapterNameError, match="third"):
        ours.target(x, adapter_names=["third"] * 4)
    ours.merge_adapter()
    with pytest.raises(RoutingError, match="are merged into target; call unmerge_adapter first"):
        ours.target(x, adapter_names=names)
