"""Adapters' tensors stand in the module tree under HF PEFT's names, and a change there is a change of the adapter."""

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
from method_example import examples, randomise
from replicas import replicas
from torch import Tensor, nn
from torch.func import functional_call

import peftcore
from peftcore.adapter import Adapter
from peftcore.layers.named_tensors import FEW_ADAPTERS

KINDS = {"linear": "0", "conv": "1", "embedding": "2", "norm": "3"}
METHODS = {name: example for name, example in examples().items() if not example.whole_model}
CASES = [
    pytest.param(name, target, id=f"{name}-{kind}")
    for name in METHODS
    for kind, target in KINDS.items()
    if kind in peftcore.registry.methods()[name].adapter.layer_kinds
]
ONE_EACH = [next(case for case in CASES if case.values[0] == name) for name in METHODS]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Conv2d(4, 4, 3), nn.Embedding(8, 16), nn.LayerNorm(16))


def input_of(target: str) -> Tensor:
    shapes = {"0": torch.randn(3, 16), "1": torch.randn(2, 4, 6, 6), "3": torch.randn(3, 16)}
    return shapes.get(target, torch.arange(5))


def adapted(method: str, target: str) -> Any:
    model: Any = peftcore.get_peft_model(base(), METHODS[method].make(target_modules=[target]))
    randomise(model, METHODS[method].spread)
    return model


def same_in_hf_peft(config: Any) -> Any:
    """HF PEFT's configuration with the same options; None if it has no such method."""
    kind = getattr(peft, type(config).__name__, None)
    if kind is None:
        return None
    names = [option.name for option in dataclasses.fields(kind) if option.init and option.name != "peft_type"]
    given = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return kind(**given, **({"feedforward_modules": []} if "feedforward_modules" in names else {}))


@pytest.mark.filterwarnings("ignore")  # HF PEFT's own
@pytest.mark.parametrize(("method", "target"), CASES)
def test_parameters_have_the_names_of_hf_peft(method: str, target: str) -> None:
    config = METHODS[method].make(target_modules=[target])
    other = same_in_hf_peft(config)
    if other is None:
        pytest.skip("HF PEFT has no such method")
    try:
        theirs = peft.get_peft_model(base(), other)
    except (TypeError, ValueError) as error:
        assert "not supported" in str(error)
        pytest.skip("HF PEFT does not adapt this kind of layer")
    wanted = {
        name.removeprefix("base_model.model.").removeprefix("base_model.") for name, _ in theirs.named_parameters()
    }
    found = {name for name, _ in peftcore.get_peft_model(base(), config).named_parameters()}
    assert found == {name for name in wanted if ".ranknum." not in name}  # AdaLoRA's is a number here


@pytest.mark.parametrize(("method", "target"), CASES)
def test_every_tensor_of_an_adapter_has_one_name(method: str, target: str) -> None:
    model = adapted(method, target)
    adapter = model[int(target)].adapters["default"]
    for kind in ("parameters", "buffers"):
        own = {id(tensor) for tensor in getattr(adapter, kind)()}
        named = [tensor for name, tensor in getattr(model, f"named_{kind}")() if id(tensor) in own]
        assert len(named) == len(own)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


@pytest.mark.parametrize(("method", "target"), ONE_EACH)
def test_values_may_be_given_by_name(method: str, target: str) -> None:
    model, other, x = adapted(method, target).eval(), adapted(method, target).eval(), input_of(target)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = other(x) if len(model) == 1 else other[int(target)](x)
    state = other[int(target)].state_dict()
    layer = model[int(target)]
    before = layer(x)
    assert not torch.allclose(before, expected)
    values = {**dict(layer.named_parameters()), **dict(other[int(target)].named_parameters())}
    torch.testing.assert_close(functional_call(layer, values, (x,)), expected)
    torch.testing.assert_close(layer(x), before)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), expected)
    layer.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize(("method", "target"), ONE_EACH)
def test_names_of_a_copy_are_of_the_copys_adapter(method: str, target: str, copied: Any) -> None:
    model, x = adapted(method, target).eval(), input_of(target)
    other, number = copied(model), int(target)
    expected = model[number](x)
    torch.testing.assert_close(other[number](x), expected, atol=0, rtol=0)
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for name, parameter in other[number].named_parameters():
            if "base_layer" not in name:
                parameter.add_(torch.rand_like(parameter))
    assert not torch.allclose(other[number](x), expected)
    torch.testing.assert_close(model[number](x), expected, atol=0, rtol=0)


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("method", "target"), CASES)
def test_a_replica_of_data_parallel_computes_with_its_own_tensors(method: str, target: str, trains: bool) -> None:
    model, x = adapted(method, target), input_of(target)
    layer = model[int(target)].train(trains)
    with torch.set_grad_enabled(trains):
        torch.manual_seed(0)
        expected = layer(x)
        first, second = replicas(layer, 2)
        for one in (first, second):
            torch.manual_seed(0)
            torch.testing.assert_close(one(x), expected)
    if trains:
        torch.manual_seed(0)
        (first(x).square().sum() + second(x).square().sum()).backward()
        assert any(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in layer.adapters["default"].parameters():
            parameter.zero_()
        torch.manual_seed(0)
        torch.testing.assert_close(second(x), expected)


def test_names_follow_the_adapters_of_a_layer() -> None:
    model: Any = adapted("LORA", "0")
    plain = set(base().state_dict())
    model.add_adapter("other", peftcore.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert {"0.lora_A.default.weight", "0.ia3_l.other"} <= model.state_dict().keys()
    with pytest.warns(UserWarning, match="'other' is the active one now"):
        model.delete_adapter("default")
    names = {name for name, _ in model[0].named_modules()}
    assert names == {"", "base_layer", "ia3_l"} and not hasattr(model[0], "lora_A")
    model.delete_adapter("other")
    assert set(model.state_dict()) == plain
    again = adapted("LORA", "0").unload()
    assert set(again.state_dict()) == plain


class Plain(Adapter):
    """An adapter whose parameters have names that its layer has, too."""

    def __init__(self, config: Any, base: Any, path: str) -> None:
        super().__init__(config, base, path)
        self.weight = nn.Parameter(torch.zeros(16, 16))
        self.merge = nn.Parameter(torch.zeros(1))

    def delta_weight(self) -> Tensor:
        return self.weight


def test_a_parameter_hides_no_attribute_of_the_layer() -> None:
    layer = adapted("LORA", "0")[0]
    layer.place("plain", Plain(peftcore.LoraConfig(), layer.base, "0"))
    assert layer.weight is layer.base_layer.weight and callable(layer.merge)
    names = {name for name, _ in layer.named_parameters()}
    assert {"adapter_weight.plain", "adapter_merge.plain", "lora_A.default.weight"} <= names


def test_a_deleted_adapter_leaves_memory() -> None:
    model: Any = adapted("LORA", "0")
    model.add_adapter("other", peftcore.LoraConfig(r=2, target_modules=["0"]))
    adapter = weakref.ref(model[0].adapters["other"])
    assert model[0].lora_A["other"] is model[0].lora_A.other
    model.delete_adapter("other")
    gc.collect()
    assert adapter() is None


def test_dropout_is_a_module_of_the_layer_and_follows_its_mode() -> None:
    config = peftcore.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)
    model: Any = peftcore.get_peft_model(base(), config)
    dropout = model.get_submodule("0.lora_dropout.default")
    assert isinstance(dropout, nn.Dropout) and dropout.training
    for module in model.modules():
        module.training = False
    assert not model[0].adapters["default"].dropout_probability
    model.train()
    assert model[0].lora_A["default"].training and model[0].adapters["default"].dropout_probability == 0.5


def test_moves_reach_every_tensor_once() -> None:
    model: Any = adapted("LORA", "0")
    weight = model[0].lora_A["default"].weight
    counted: list[int] = []
    model._apply(lambda tensor: counted.append(id(tensor)) or tensor)
    assert counted.count(id(weight)) == 1
    model.double()
    assert model[0].lora_A["default"].weight is weight and weight.dtype == torch.float64
    model.to("meta")
    assert model[0].adapters["default"].lora_A_weight.is_meta and model[0].lora_A["default"].weight.is_meta


def test_a_layer_with_many_adapters_keeps_no_modules_of_theirs() -> None:
    model: Any = adapted("LORA", "0")
    kept = model[0].lora_A["default"]
    assert model[0].lora_A["default"] is kept
    for number in range(FEW_ADAPTERS):
        model.add_adapter(f"a{number}", peftcore.LoraConfig(r=2, target_modules=["0"]))
    assert model[0].lora_A["default"] is kept
    first = weakref.ref(model[0].lora_A["a0"])
    assert first() is None
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert names == [f"0.lora_A.{name}.weight" for name in ["default", *(f"a{n}" for n in range(FEW_ADAPTERS))]]
    assert torch.equal(replicas(model[0])[0](torch.ones(1, 16)), model[0](torch.ones(1, 16)))
