"""Modules by any name, and the walk over a model's original modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.wrapper import NamedModules, original_modules, unwrapped


@pytest.mark.parametrize("name", ["keys", "type", "forward", "changes", "lora_A"])
def test_a_module_may_have_the_name_of_an_attribute(name: str) -> None:
    modules, layer = NamedModules(), nn.Linear(2, 2)
    modules[name] = layer
    assert name in modules and modules[name] is layer and list(modules) == [name] and len(modules) == 1
    del modules[name]
    assert name not in modules and modules.get(name) is None


def test_every_way_to_change_named_modules_is_counted() -> None:
    modules = NamedModules()
    modules["a"] = nn.Linear(2, 2)
    modules.a = nn.Linear(2, 2)
    nn.Sequential(modules).set_submodule("0.a", nn.Linear(2, 2))
    del modules["a"]
    assert modules.changes == 4


class Experts(nn.Module):
    """A raw parameter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(2, 4, 4))
        self.router = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x) @ self.stack.sum(-1)


def test_the_walk_sees_the_paths_from_before_injection() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(4, 4), "experts": Experts(), "head": nn.Linear(4, 4)})
    net["again"] = net["layer"]
    before = [path for path, _ in original_modules(net)]
    config = LoraConfig(
        target_modules=["layer", "router"], target_parameters=["experts.stack"], modules_to_save=["head"]
    )
    model: Any = get_peft_model(net, config)
    walked = list(original_modules(model))
    assert [path for path, _ in walked] == before == ["layer", "experts", "experts.router", "head", "again"]
    modules = dict(walked)
    assert isinstance(modules["layer"], AdapterLayer) and modules["again"] is modules["layer"]
    assert type(unwrapped(modules["layer"])) is nn.Linear and type(unwrapped(modules["experts"])) is Experts
