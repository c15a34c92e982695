"""Modules by any name, and the walk over a model's original modules."""

from typing import Any

import pytest
import torch
from routed_models import adapted, lora
from torch import Tensor, nn

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import RoutingError
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


def test_layers_whose_rows_cannot_be_matched_are_refused() -> None:
    class Mixing(nn.Module):
        kept = 5

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
            self.mixed = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixed(self.experts[0](x.flatten(0, 1))[: self.kept])

    model = adapted(Mixing().double(), a=lora(target_modules=["experts.0"]), b=lora(target_modules=["mixed"]))
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    with pytest.raises(RoutingError, match=r"experts\.0 is a single expert and gets tokens without their rows"):
        model(x, adapter_names=["a", None])
    for gradients in (False, True):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(RoutingError, match="mixed sees 5 rows and the batch has 2"),
        ):
            model(x, adapter_names=["b", None])
    model.kept = 4  # two for each row, or so it seems
    with pytest.raises(RoutingError, match="mixed sees 4 rows and the batch has 2"):
        model(x, adapter_names=["b", None])
    assert model(x, adapter_names=["a", "a"]).shape == (4, 12)
    model.kept = 8  # every token of the batch
    mixed = model(x, adapter_names=["b", None])
    torch.testing.assert_close(mixed[:4], model(x, adapter_names="b")[:4])
    torch.testing.assert_close(mixed[4:], model(x, adapter_names="__base__")[4:])


def test_factors_of_adapters_are_found_in_module_dicts() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], r=1))
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=1))
    holders = [module for module in model.modules() if isinstance(module, nn.ModuleDict)]
    assert [list(holder) for holder in holders] == [["default", "other"], ["default", "other"]]
    assert holders[0] is model[0].lora_A and holders[1] is model[0].lora_B
