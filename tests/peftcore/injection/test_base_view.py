"""`peft_model.model` in scripts for HF PEFT."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from peftcore import LoraConfig, get_peft_model
from peftcore.injection.base_view import hide_model, show_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=1, **sizes))


def innermost(model: Any) -> Any:
    for _ in range(10):
        if not hasattr(model, "model"):
            return model
        model = model.model
    raise AssertionError("the chain of attributes `model` does not end")


def test_a_model_without_such_an_attribute_shows_itself() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["lin"]))
    assert isinstance(model.model, Net) and model.model.lin is model.lin
    model.model.extra = nn.ReLU()
    assert "extra" in dict(model.named_children())
    assert innermost(model).lin is model.lin
    x = torch.ones(1, 3)
    assert torch.equal(model.model(x), model(x))
    assert not hasattr(model.unload(), "model")


def test_an_attribute_that_is_set_later_is_the_attribute() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["lin"]))
    model.model = layer = nn.Linear(1, 1)
    assert model.model is layer
    del model.model
    assert isinstance(model.model, Net)


def test_code_of_the_model_finds_no_such_attribute_while_it_runs() -> None:
    class Asking(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not hasattr(self, "model")
            return super().forward(x)

    get_peft_model(Asking(), LoraConfig(r=2, target_modules=["lin"]))(torch.ones(1, 3))


def test_a_transformers_model_keeps_its_own_attribute_and_shows_it_once_more() -> None:
    plain = llama()
    inner = plain.model
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.model is inner and isinstance(inner, LlamaModel)
    assert model.model.model.layers is inner.layers
    assert innermost(model).layers is inner.layers
    assert [name for name, _ in model.named_modules() if name.startswith("model.model")] == []
    assert model.get_decoder() is inner.base_model is inner
    unloaded = model.unload()
    assert type(unloaded.model) is LlamaModel and not hasattr(unloaded.model, "model")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # HF PEFT reads it
def test_submodules_and_methods_of_the_whole_model_are_attributes_of_the_model_without_its_head() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for one in (model, theirs):
        assert one.model.lm_head is one.base_model.model.lm_head
        one.model.lm_head = head = nn.Linear(16, 20)
        assert one.base_model.model.lm_head is head is one.model.lm_head
        assert len(one.model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)[0]) == 4
    assert "lm_head" not in dict(model.model.named_children()) and not hasattr(model.model, "no_such_attribute")
    assert set(model.model.state_dict()) < {name.removeprefix("model.") for name in model.state_dict()}
    assert copy.deepcopy(model).model.lm_head is not head


def test_the_model_without_its_head_has_only_its_own_attributes_after_unloading() -> None:
    inner = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).unload().model
    assert type(inner) is LlamaModel and vars(inner).keys() == vars(llama().model).keys()
    assert not hasattr(inner, "lm_head")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_show_their_own_base(copied: Any) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    for plain, target in ((llama(), "q_proj"), (gpt2, "c_attn")):
        model = get_peft_model(plain, LoraConfig(r=2, target_modules=[target]))
        other = copied(model)
        assert type(other) is type(model)
        shown = other.model.model if plain is not gpt2 else other.model
        modules = {id(module) for module in other.modules()}
        assert all(id(module) in modules for _, module in shown.named_children())
        assert other.model.lm_head is other.lm_head


def test_a_module_is_shown_and_hidden() -> None:
    module = Net()
    show_model(module)
    show_model(module)
    assert module.model.lin is module.lin and type(module).__name__ == "Net"
    hide_model(module)
    hide_model(module)
    assert type(module) is Net


def test_an_attribute_that_a_script_has_set_on_the_model() -> None:
    plain = llama()
    plain.note = "mine"
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.model.note == "mine" and "note" not in vars(model.model)
    model.model.note = "other"
    assert model.note == "other"
    assert not hasattr(model.unload().model, "note")
