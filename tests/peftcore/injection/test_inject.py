"""Putting adapters into a model and deleting them again."""

import contextlib
import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from net import Net
from torch import Tensor, nn

import peftcore
from peftcore import (
    AdapterNameError,
    ConfigError,
    KasaConfig,
    LoraConfig,
    PeftError,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from peftcore.injection import inject
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.wrapper import LayerWrapper

CONFIG = LoraConfig(r=2, target_modules=["target"])
X = torch.randn(3, 6)


class Attention(nn.Module):
    """Three projections of one input, and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


def test_only_the_adapter_trains_and_the_class_stays() -> None:
    net = Net(nn.Linear(6, 6))
    assert inject_adapter_in_model(CONFIG, net) is net and type(net) is Net
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "target.lora_A.default.weight",
        "target.lora_B.default.weight",
    }


def test_a_layer_at_two_paths_has_one_wrapper() -> None:
    layer = nn.Linear(6, 6)
    net: Any = nn.Sequential(layer, nn.ReLU(), layer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), net)
    assert isinstance(net[0], AdapterLayer) and net[0] is net[2]
    adapter_set(net)


def test_deleting_the_last_adapter_leaves_the_very_layers_of_before() -> None:
    layer = nn.Linear(6, 6)
    net = Net(layer)
    model: Any = get_peft_model(net, CONFIG, "a")
    model.add_adapter("b", CONFIG)
    model.delete_adapter(["a", "b"])
    assert model.target is layer and not any(isinstance(module, LayerWrapper) for module in model.modules())


def test_an_error_leaves_the_model_without_a_trace() -> None:
    net = Net(nn.Linear(6, 6))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(TargetError, match="match no layer"):
        inject_adapter_in_model(LoraConfig(target_modules=["elsewhere"]), net)
    assert ATTRIBUTE not in vars(net) and not net._forward_pre_hooks and not net._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_layers_that_read_one_input_know_each_other() -> None:
    model: Any = get_peft_model(nn.ModuleDict({"self_attn": Attention()}), LoraConfig(target_modules="all-linear"))
    attention = model["self_attn"]
    assert attention.q_proj.siblings == [attention.k_proj, attention.v_proj]
    assert attention.v_proj.siblings == attention.o_proj.siblings == []


def test_an_adapter_in_use_by_a_route_is_not_deleted() -> None:
    model: Any = get_peft_model(Net(nn.Linear(6, 6)), CONFIG, "a")
    model.add_adapter("b", CONFIG)
    with model.route("b"), pytest.raises(AdapterNameError, match="in use by an open route"):
        model.delete_adapter("b")
    model.delete_adapter("b")
    assert list(model.peft_config) == ["a"]


def removed_by_a_library(model: nn.Module) -> None:
    """Do what diffusers does to unload adapters: put the base layers back, and delete `peft_config`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdapterLayer):
            setattr(model, path, module.get_base_layer())
    del model.peft_config


@pytest.mark.parametrize("merges", [False, True])
def test_adapters_that_a_library_has_removed_are_forgotten(merges: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, plain)
    base, adapted = model[0].base_layer, model(x)
    if merges:
        model[0].merge()
    removed_by_a_library(model)
    after = model(x)
    if merges:
        torch.testing.assert_close(after, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not: the adapter was loaded already
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["1"]), model)
    assert model[0] is base and list(model.peft_config) == ["default"]
    assert torch.equal(model(x), after)
    model[1].merge()
    model[1].unmerge()
    assert torch.equal(model(x), after)


def test_the_configurations_of_a_model_that_keeps_its_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first, second = (LoraConfig(r=2, target_modules=["0"]) for _ in range(2))
    inject_adapter_in_model(first, model, "a")
    inject_adapter_in_model(second, model, "b")
    assert "a" in model.peft_config and "c" not in model.peft_config
    assert [config.r for config in model.peft_config.values()] == [2, 2]
    with pytest.raises(PeftError, match="cannot be set; inject_adapter_in_model adds"):
        model.peft_config["c"] = first
    assert model.peft_config.pop("c", None) is None
    model.peft_config.pop("a")
    assert list(model.peft_config) == ["b"] == list(model[0].adapters)
    with pytest.warns(UserWarning, match="already"):
        inject_adapter_in_model(second, model, "b")
    copied = copy.deepcopy(model)
    del copied.peft_config["b"]
    assert type(copied[0]) is nn.Linear and type(model[0]) is AdapterLayer


def test_a_peft_model_has_its_own_configurations() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "a")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["1"]), "b")
    assert isinstance(adapted.peft_config, dict) and list(adapted.peft_config) == ["a", "b"]
    assert not hasattr(adapted.unload(), "peft_config")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["0", "2"], r"adapts the 1 layers that state_dict names; only the configuration names \['2'\]"),
        (["2"], r"only the configuration names \['2'\]; only state_dict names \['0'\]"),
        ("all-linear", r"only the configuration names \['2'\]"),
    ],
)
def test_targets_other_than_those_of_the_state_dict_are_named(targets: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.warns(RuntimeWarning, match=message):
        inject_adapter_in_model(LoraConfig(target_modules=targets), model, state_dict={"0.lora_A.weight": Tensor()})
    assert isinstance(model[0], AdapterLayer) and not isinstance(model[2], AdapterLayer)


@pytest.mark.parametrize("config", [LoraConfig(), LoraConfig(target_modules=["0", "2"], exclude_modules=["2"])])
def test_the_same_targets_or_none_are_no_difference(config: LoraConfig) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter_in_model(config, model, state_dict={"0.lora_A.weight": Tensor()})


def test_a_route_that_opens_after_the_checks_of_a_deletion_keeps_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(Net(nn.Linear(6, 6)), CONFIG, "a")
    model.add_adapter("b", CONFIG)
    check = inject.check_deletable
    with contextlib.ExitStack() as stack:

        def open_a_route_after_the_check(*args: Any) -> None:
            check(*args)
            stack.enter_context(model.route("b"))  # as another thread may do

        monkeypatch.setattr(inject, "check_deletable", open_a_route_after_the_check)
        with pytest.raises(AdapterNameError, match="'b' is in use by an open route"):
            inject.delete_adapter(model, "b")
        assert list(model.target.adapters) == ["a", "b"] == list(model.peft_config)


def test_no_route_opens_for_an_adapter_that_is_being_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = get_peft_model(Net(nn.Linear(6, 6)), CONFIG, "a")
    refused = []

    def open_a_route(*_: Any) -> None:
        with pytest.raises(AdapterNameError, match="Adapter a does not exist"), model.route("a"):
            pass
        refused.append(True)

    monkeypatch.setattr(inject, "_remove_empty_wrappers", open_a_route)
    inject.delete_adapter(model, "a")
    assert refused and not adapter_set(model).selection.in_use["a"]


# -- an adapter in the place of one of the same name


def net_of_two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.filterwarnings("ignore:.*already.*")
def test_a_replaced_adapter_starts_and_leaves_the_random_numbers_as_in_hf_peft() -> None:
    results = []
    for library in (peft, peftcore):
        model: Any = net_of_two()
        for rank in (2, 3):
            model = library.inject_adapter_in_model(library.LoraConfig(r=rank, target_modules=["0"]), model)
        results.append((model[0].lora_A["default"].weight.detach(), torch.get_rng_state()))
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*results, strict=True))


KASA = {"kasa_config": KasaConfig()}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}
REPLACED = [
    ({"r": 2, **KASA}, {"r": 3, **KASA}),
    ({"r": 2, **KASA}, {"r": 2}),
    ({"r": 2}, {"r": 2, **KASA}),
    ({"r": 2, **LOFTQ}, {"r": 3, **LOFTQ}),
    ({"r": 2, "modules_to_save": ["1"]}, {"r": 2, "bias": "all"}),
]


@pytest.mark.parametrize(("first", "second"), REPLACED)
def test_a_replaced_adapter_does_not_restrict_the_new_one(first: Any, second: Any) -> None:
    """The new adapter, and the state of the random generator, are those of a model without the first one."""
    model: Any = get_peft_model(net_of_two(), LoraConfig(target_modules=["0"], **first))
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="replaced by an untrained one"):
        model = get_peft_model(model, LoraConfig(target_modules=["0"], **second))
    generator, tensors, plain = torch.get_rng_state(), model.state_dict(), net_of_two()
    torch.manual_seed(1)
    expected = get_peft_model(plain, LoraConfig(target_modules=["0"], **second)).state_dict()
    assert torch.equal(generator, torch.get_rng_state()) and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    base = net_of_two().state_dict()
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.unload().state_dict().items())


def test_other_adapters_restrict_the_one_that_replaces_another() -> None:
    model = get_peft_model(net_of_two(), LoraConfig(r=2, target_modules=["0"], **KASA), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], **KASA))
    old = adapter_set(model).adapters("a")["0"]
    with pytest.raises(ConfigError, match="KaSA cannot be combined"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]), "a")
    with pytest.raises(ConfigError, match=r"\['b'\] replaced the weight of 0 .* delete the first"):
        get_peft_model(model, LoraConfig(r=3, target_modules=["0"], **KASA), "a")
    assert adapter_set(model).adapters("a")["0"] is old
