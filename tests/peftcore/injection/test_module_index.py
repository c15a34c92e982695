"""Where modules stand while hosts come and go: at several paths, inside one another, inside encoders."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.module_index import ModuleIndex


class Experts(nn.Module):
    """A raw parameter, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_of_all = nn.Parameter(torch.randn(3, 4, 4))
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) + (x @ self.weight_of_all.sum(0))


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Sequential(nn.Linear(4, 4), Experts())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **options)


def tree(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("end", ["delete", "unload"])
def test_a_host_inside_of_what_another_stands_for_goes_with_it(end: str) -> None:
    torch.manual_seed(0)
    base, x = Twice(), torch.randn(2, 4)
    expected, before = base(x), tree(base)
    model = get_peft_model(base, config(target_modules=["gate", "0"], target_parameters=["weight_of_all"]))
    assert not torch.allclose(model(x), expected)
    alone = copy.deepcopy(model)
    alone.first[1].base_layer.gate.adapters["default"].lora_B_weight.data.zero_()
    assert not torch.allclose(alone(x), model(x)), "the inner adapter acts"
    if end == "delete":
        model.delete_adapter("default")
    else:
        model.unload()
    assert tree(base) == before
    assert torch.equal(base(x), expected)


def test_replacing_keeps_every_path_and_knows_what_shows_again() -> None:
    model = Twice()
    module_index = ModuleIndex(model)
    block, layer, other = model.first, model.first[0], nn.Sequential(nn.Linear(4, 4))
    assert module_index.paths[id(layer)] == ["first.0", "second.0"]
    module_index.replace(block, other)
    assert model.first is model.second is other
    assert module_index.paths[id(other[0])] == ["first.0", "second.0"] and module_index.parent("second.0") is other
    module_index.replace(block, nn.Identity())  # it stands nowhere any more
    assert model.first is other


def test_a_second_adapter_finds_what_stands_inside_of_adapted_parameters() -> None:
    torch.manual_seed(0)
    both: dict[str, Any] = {"target_modules": ["gate"], "target_parameters": ["weight_of_all"]}
    base, x = nn.Sequential(Experts()), torch.randn(2, 4)
    expected, before = base(x), tree(base)
    model = get_peft_model(base, config(**both), "first")
    model.add_adapter("second", config(**both))
    ranks = [set(model.adapter_ranks(name)) for name in ("first", "second")]
    assert ranks[0] == ranks[1] == {"0.gate", "0.weight_of_all"}
    model.set_adapter("second")
    model.delete_adapter("first")
    assert not torch.allclose(model(x), expected)
    model.delete_adapter("second")
    assert tree(model.unload()) == before and torch.equal(base(x), expected)
