"""The adapters of a model by name: their layers, parameters and tensors, and names that are not loaded."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import AdapterNameError, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peftcore.injection.adapter_set import ReplacedRows, adapter_set, untouched_names
from peftcore.layers.trained_bias import TrainedBias
from peftcore.methods.trainable_tokens import TrainableTokens


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    """Names of parameters, which must be distinct ones."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    return {names[id(parameter)] for parameter in parameters}


def test_adapters_and_trained_biases_are_listed_apart() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["1"], bias="all"))
    adapters = adapter_set(model)
    assert list(adapters.adapters("default")) == ["1"]
    assert set(adapters.biases("default")) == {"1", "2", "3"}
    assert all(isinstance(bias, TrainedBias) for bias in adapters.biases("default").values())


def test_the_method_of_a_name_excludes_its_trained_token_rows() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]}))
    adapters = adapter_set(model)
    assert set(adapters.adapters("default")) == {"0", "1"} and set(adapters.of_method("default")) == {"1"}
    assert isinstance(adapters.adapters("default")["0"], TrainableTokens)


def test_the_parameters_of_a_name_are_all_that_it_trains_each_once() -> None:
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["2"], bias="lora_only")
    model: Any = get_peft_model(net(), config, "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["1"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".b." not in name}
    assert names_of(model, adapter_set(model).parameters("a")) == trained
    assert {"2.modules_to_save.a.weight", "2.modules_to_save.a.bias"} < trained
    assert len(trained) == 5  # A, B and the layer's bias
    assert names_of(model, adapter_set(model).parameters("b")) == {
        "1.lora_A.b.weight",
        "1.lora_B.b.weight",
    }


def test_shared_parameters_count_once() -> None:
    """VeRA's projections are shared by all layers; only the two vectors of each layer train."""
    model = get_peft_model(net(), VeraConfig(r=2, target_modules=["1", "2"]))
    adapters = adapter_set(model)
    assert len(adapters.parameters("default")) == 4
    shared = adapters.shared("default")
    assert shared is not None and all(one.shared is shared for one in adapters.adapters("default").values())
    assert adapter_set(get_peft_model(net(), LoraConfig(target_modules=["1"]))).shared("default") is None


def test_a_prompt_is_no_adapter_of_a_layer(llama: Any) -> None:
    model = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "p")
    adapters = adapter_set(model)
    prompt = adapters.prompt("p")
    assert prompt is not None and not adapters.adapters("p") and adapters.prompt("other") is None
    assert adapters.parameters("p") == list(prompt.parameters())
    assert adapters.prompts_in_effect() == [prompt]
    with model.disable_adapter():
        assert adapters.prompts_in_effect() == []


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def test_untouched_names_are_the_frozen_tensors_of_the_base() -> None:
    model: Any = get_peft_model(net(), LoraConfig(r=2, target_modules=["1"], modules_to_save=["2"]))
    model.set_requires_grad("default", False)  # a frozen adapter is still no part of the base
    base = {"0.weight", "1.base_layer.weight", "1.base_layer.bias", "3.weight", "3.bias"}
    assert set(untouched_names(model)) == base | {"2.base_layer.weight", "2.base_layer.bias"}
    model[3].weight.requires_grad_(True)
    assert "3.weight" not in untouched_names(model)


def test_a_name_that_is_not_loaded_is_an_error_that_lists_the_loaded_ones() -> None:
    model: Any = get_peft_model(net(), LoraConfig(target_modules=["1"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["1"]))
    adapters = adapter_set(model)
    adapters.require("a", "b")
    for call in (adapters.require, adapters.adapters, adapters.biases, adapters.parameters, adapters.shared):
        with pytest.raises(AdapterNameError, match="Adapter x does not exist; loaded: a, b"):
            call("x")
    model.delete_adapter(["a", "b"])
    with pytest.raises(AdapterNameError, match="loaded: none yet"):
        adapters.require("a")
    with pytest.raises(AdapterNameError, match="this Linear has no adapters; call get_peft_model first"):
        adapter_set(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["as it was", "cast"])
def test_replaced_rows_are_restored_and_tied_parameters_stay_tied(dtype: torch.dtype | None) -> None:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embedding.weight
    own = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "middle": nn.Linear(6, 6)})
    adapters = adapter_set(get_peft_model(model, LoraConfig(target_modules=["middle"])))
    for path, layer in (("embedding.weight", embedding), ("head.weight", head)):
        layer._parameters["weight"] = nn.Parameter(torch.zeros(9, 6))
        adapters.replaced_rows[path] = ReplacedRows(layer, "weight", own)
    if dtype is not None:
        model.to(dtype)
    adapters.restore_rows()
    assert embedding.weight is head.weight and torch.equal(embedding.weight, own.to(embedding.weight))
    assert embedding.weight.dtype == (dtype or torch.float32) and not adapters.replaced_rows
    assert (embedding.weight is own) == (dtype is None)
