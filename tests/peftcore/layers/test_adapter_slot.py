"""A base layer that is replaced, moved or read while its slot holds adapters."""

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from method_example import examples, randomise
from quantised_layers import quantised
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.errors import MergeError
from peftcore.injection.adapter_set import adapter_set
from peftcore.registry import methods

LAYERED = {
    method: example
    for method, example in examples().items()
    if "linear" in methods()[method].adapter.layer_kinds and example.merges and not example.whole_model
}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8)).double()


# -- replaced --------------------------------------------------------------------------------------------------------


def by_assignment(model: Any, layer: nn.Module) -> None:
    model[0].base_layer = layer


def by_path(model: Any, layer: nn.Module) -> None:
    model.set_submodule("0.base_layer", layer)


def in_the_table(model: Any, layer: nn.Module) -> None:
    """As libraries do that put quantised layers into a model."""
    model[0]._modules["base_layer"] = layer


WAYS = [("LORA", by_assignment), ("LORA", by_path), *((method, in_the_table) for method in LAYERED)]


@pytest.mark.parametrize("first", ["forward", "merge"])
@pytest.mark.parametrize(("method", "put"), WAYS)
def test_adapters_are_on_the_base_that_is_there_now(
    method: str, put: Callable[[Any, nn.Module], None], first: str
) -> None:
    model: Any = get_peft_model(net(), LAYERED[method].make(target_modules=["0"])).eval()
    randomise(model, 0.2)
    with torch.no_grad():
        model(X)
    other = net(1)[0]
    put(model, other)
    if first == "merge":
        model.merge_adapter()
        model.unmerge_adapter()
    adapter = adapter_set(model).adapters("default")["0"]
    assert first == "forward" or adapter.base.layer is other
    fresh: Any = get_peft_model(nn.Sequential(copy.deepcopy(other)), LAYERED[method].make(target_modules=["0"]))
    fresh.eval().load_state_dict(model.state_dict())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(X), fresh(X), atol=1e-9, rtol=0)


def test_a_linear_layer_that_is_quantised_under_its_adapter() -> None:
    plain = nn.Sequential(nn.Linear(64, 32))
    model: Any = get_peft_model(plain, LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False))
    four_bit = quantised("nf4")
    model[0].base_layer = four_bit
    model(torch.randn(2, 64))
    adapter: Any = adapter_set(model).adapters("default")["0"]
    weight = adapter.base.read()
    torch.testing.assert_close(
        weight, bnb.functional.dequantize_4bit(four_bit.weight.data, four_bit.weight.quant_state)
    )


def test_trained_biases_are_on_the_base_that_is_there_now() -> None:
    model: Any = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], bias="all"), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], bias="lora_only"))
    randomise(model, 0.2)
    other = net(1)[0]
    model[0].base_layer = other
    for name in ("a", "b"):
        model.set_adapter(name)
        adapter = adapter_set(model).adapters(name)["0"]
        assert adapter.trained_bias.base.layer is other
        with torch.no_grad():
            expected = X @ (other.weight + adapter.merged_weight(torch.zeros_like(other.weight))).T
            torch.testing.assert_close(model[0](X), expected + adapter.trained_bias.bias)


def test_a_base_that_is_replaced_under_a_merge_is_an_error() -> None:
    model: Any = get_peft_model(net(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    before, old = model(X), model[0].base_layer
    model.merge_adapter()
    model[0].base_layer = net(1)[0]
    for call in (lambda: model(X), model.unmerge_adapter, model.unload):
        with pytest.raises(MergeError, match="put the old layer back"):
            call()
    model[0].base_layer = old
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), before)


# -- moved -----------------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


MOVES: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.double().float(),
    "meta": lambda model: model.to("meta"),  # another device
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merged_models_move_as_a_whole(move: str, lora_bias: bool) -> None:
    def adapted() -> Any:
        model: Any = get_peft_model(two_layers(), LoraConfig(target_modules=["0", "2"], lora_bias=lora_bias))
        randomise(model, 0.3)
        return model

    expected = MOVES[move](adapted()).state_dict()
    model = adapted()
    model.merge_adapter()
    MOVES[move](model)
    model.unmerge_adapter()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and tensor.device == expected[name].device, name
        assert tensor.is_meta or torch.equal(tensor, expected[name]), name
    if move != "meta":
        dtype = next(model.parameters()).dtype
        assert model(torch.randn(2, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("depth", [1, 2])
def test_a_merged_model_moves_while_it_is_disabled(depth: int) -> None:
    model: Any = get_peft_model(two_layers(), LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.merge_adapter()
    expected = {name: tensor.double() for name, tensor in copy.deepcopy(model.state_dict()).items()}
    with contextlib.ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(model.disable_adapter())
        model.double()
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == torch.float64 for name, tensor in expected.items()
    )
    model.unmerge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("storage", ["nf4", "int8", "Q4_1"])
def test_quantised_bases_that_are_merged_move_too(storage: str) -> None:
    model: Any = get_peft_model(nn.Sequential(quantised(storage)), LoraConfig(target_modules=["0"]))
    randomise(model, 0.3)
    base = adapter_set(model).layers["0"].base
    before, bias = base.read(), base.layer.bias.detach().clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    torch.testing.assert_close(base.read(), before, atol=0, rtol=0)
    assert torch.equal(base.layer.bias, bias.bfloat16())


@pytest.mark.parametrize("merged", [False, True])
def test_a_start_that_replaced_the_base_is_undone_after_a_move(merged: bool) -> None:
    net = two_layers()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model: Any = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights="loftq"))
    assert not torch.equal(model[0].base_layer.weight, before["0.weight"])
    if merged:
        model.merge_adapter()
    model.double()
    plain = model.unload()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name].double()) and tensor.dtype == torch.float64
    plain(torch.randn(2, 8, dtype=torch.float64))


def test_a_merged_pair_that_is_tied_stays_tied_after_a_move() -> None:
    model: Any = two_layers()
    model[2].weight = model[0].weight
    model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert model[0].base_layer.weight is model[2].base_layer.weight
    assert model[0].base_layer.weight.dtype == torch.float64


# -- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float", "nf4", "int8", "Q4_1"])
def test_the_unmerged_weight_is_read_without_writing(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = two_layers() if storage == "float" else nn.Sequential(quantised(storage))
    model: Any = get_peft_model(plain, LoraConfig(target_modules=["0"]))
    randomise(model, 0.3)
    base = adapter_set(model).layers["0"].base
    before = base.read().clone()
    model.merge_adapter()
    assert not torch.allclose(base.read(), before, atol=1e-2)
    monkeypatch.setattr(type(base), "restore", lambda *_: pytest.fail("the layer was written to"))
    torch.testing.assert_close(base.read_unmerged(), before, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["HIRA", "DORA"])
def test_threads_read_a_merged_base_at_once(method: str) -> None:
    """An adapter on top of a merged one reads the unmerged weight in each forward, while others multiply the merged."""
    model: Any = get_peft_model(net(), LoraConfig(target_modules=["0"], init_lora_weights=False), "low")
    top = (
        LoraConfig(target_modules=["0"], use_dora=True)
        if method == "DORA"
        else LAYERED[method].make(target_modules=["0"])
    )
    model.add_adapter("top", top)
    model.set_adapter(["low", "top"])
    randomise(model, 0.3)
    model.merge_adapter(["low"])
    expected, wrong, end = copy.deepcopy(model)(X).detach(), [], threading.Event()

    def read() -> None:
        while not end.is_set():
            adapter_set(model).layers["0"].base.read_unmerged()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for _ in range(500):
        with torch.no_grad():
            wrong += [1] * (not torch.allclose(model(X), expected))
    end.set()
    for thread in readers:
        thread.join()
    assert not wrong
