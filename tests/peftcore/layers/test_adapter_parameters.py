"""Adapters on raw parameters of a module, which are replaced while the module's forward runs."""

from typing import Any

import pytest
import torch
from method_example import randomise
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import RoutingError, TargetError
from peftcore.injection.adapter_set import adapter_set

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 8, 12, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->no", self.weights, x)


def test_raw_parameters_of_a_module_that_is_replaced() -> None:
    model: Any = get_peft_model(
        nn.Sequential(Experts()), LoraConfig(r=2, target_modules=[], target_parameters=["0.weights"])
    )
    randomise(model, 0.3)
    model(X)
    other = Experts()
    model[0].base_layer = other
    adapter = adapter_set(model).adapters("default")["0.weights"]
    expected = torch.einsum("eoi,ni->no", adapter.merged_weight(other.weights.detach()), X)
    torch.testing.assert_close(model(X), expected)
    assert not model[0].merged
    model.merge_adapter()
    assert model[0].merged and model[0].merged_adapters == ["default"]
    torch.testing.assert_close(model(X), expected)
    assert model.unload()[0] is other


def test_the_attributes_of_hf_peft_name_the_parameter_that_they_show() -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["0.weights"], rank_pattern={"0.weights": 2})
    model: Any = get_peft_model(nn.Sequential(Experts()), config)
    assert model[0].parameter_name == "weights"
    assert model[0].r["default"] == 2 and model[0].scaling["default"] == config.lora_alpha / 2
    assert model[0].lora_A["default"].weight.shape == (2 * 2, 12)  # two experts


def test_raw_parameters_that_are_merged_move_too() -> None:
    model: Any = get_peft_model(
        nn.Sequential(Experts()), LoraConfig(r=2, target_modules=[], target_parameters=["0.weights"])
    )
    randomise(model, 0.3)
    before = model[0].base_layer.weights.detach().clone()
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert torch.equal(model[0].base_layer.weights, before.float())


def test_whole_weights_are_one_for_the_batch() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix.T

    net = nn.Sequential(Raw()).double()
    one: dict[str, Any] = {"target_modules": [], "target_parameters": ["0.matrix"], "init_lora_weights": False}
    model: Any = get_peft_model(net, LoraConfig(r=2, **one), "a").double()
    model.add_adapter("b", LoraConfig(r=2, **one))
    randomise(model, 0.2)
    model.eval()
    x = torch.randn(2, 12, dtype=torch.float64)
    base = model(x, adapter_names="__base__")
    a, b = (model(x, adapter_names=name) - base for name in "ab")
    torch.testing.assert_close(model(x, adapter_names={"a": 0.5, "b": -1.0}), base + 0.5 * a - b)
    with pytest.raises(RoutingError, match="is one weight for all rows of a batch"):
        model(x, adapter_names=["a", "b"])


def test_the_modules_own_parameter_is_in_place_again_after_a_forward() -> None:
    experts = Experts()
    weights = experts.weights
    model: Any = get_peft_model(
        nn.Sequential(experts), LoraConfig(r=2, target_modules=[], target_parameters=["0.weights"])
    )
    randomise(model, 0.3)
    with model.disable_adapter():
        base = model(X)
    assert not torch.allclose(model(X), base)
    assert experts.weights is weights


def test_the_weight_of_a_linear_layer_computes_what_an_adapter_of_the_layer_computes() -> None:
    models: list[Any] = []
    for options in ({"target_modules": ["0"]}, {"target_modules": [], "target_parameters": ["0.weight"]}):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(12, 8).double())
        models.append(get_peft_model(base, LoraConfig(r=2, **options)))
        randomise(models[-1], 0.3)
    torch.testing.assert_close(models[1](X), models[0](X))
    merged = models[1].merge_and_unload()
    torch.testing.assert_close(merged(X), models[0](X))


def test_a_layer_has_adapters_on_itself_or_on_its_weight() -> None:
    on_weight, on_layer = LoraConfig(target_modules=[], target_parameters=["0.weight"]), LoraConfig(target_modules="0")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), on_layer)
    with pytest.raises(TargetError, match="the layer 0 has adapters"):
        model.add_adapter("other", on_weight)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), on_weight)
    with pytest.raises(TargetError, match="0: an adapter on its parameter is in place"):
        model.add_adapter("other", on_layer)
    with pytest.raises(TargetError, match="name it in one of the two"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules="0", target_parameters=["0.weight"]))
