"""Attributes of HF PEFT's models on ours: `base_model`, `prefix`, shared tensors; see also test_base_view.py."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quiet_training import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

import peftcore
from peftcore import LoraConfig, VeraConfig, get_peft_model


def test_base_model_is_hf_pefts_outside_of_a_forward_pass_and_transformers_inside(model: Any) -> None:
    assert model.base_model.model is model
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(model.base_model))
    model(torch.arange(3)[None])
    assert seen == [model.model]


def test_paths_of_hf_peft_find_the_submodules_of_the_model(model: Any) -> None:
    layer = model.model.layers[0]
    assert model.get_submodule("base_model.model.model.layers.0") is layer
    assert model.get_submodule("base_model.model.layers.0") is layer is model.get_submodule("model.layers.0")
    assert model.get_parameter("base_model.model.lm_head.weight") is model.lm_head.weight
    for path in ("base_model.model.nothing", "nothing"):
        with pytest.raises(AttributeError, match="nothing"):
            model.get_submodule(path)


def test_methods_that_read_base_model_find_the_model_without_its_head(model: Any) -> None:
    assert model.get_decoder() is model.model
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_input_embeddings.__func__.__wrapped__ is LlamaForCausalLM.get_input_embeddings
    embeddings = nn.Embedding(20, 8)
    model.set_input_embeddings(embeddings)
    assert model.model.embed_tokens is embeddings


def test_tensors_that_all_layers_share_are_attributes_of_methods_that_have_them() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), VeraConfig(target_modules=["0", "1"], r=2))
    assert model.vera_A["default"].shape == (2, 5)
    assert model.vera_B["default"].shape == (5, 2)
    assert model.prefix == "vera_lambda_"
    lora = get_peft_model(nn.Sequential(nn.Linear(4, 5)), LoraConfig(target_modules=["0"]))
    with pytest.raises(AttributeError):
        lora.vera_A  # noqa: B018
    assert lora.prefix == "lora_"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # HF PEFT's
def test_a_model_with_a_prompt_shows_its_word_embeddings_as_in_peft() -> None:
    tables = []
    for library in (peft, peftcore):
        torch.manual_seed(0)
        config = library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = library.get_peft_model(tiny_llama(), config)
        tables.append(model.word_embeddings(torch.arange(3)))
    assert torch.equal(*tables)
    assert model.word_embeddings is model.get_input_embeddings()
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2))
    assert not hasattr(plain, "word_embeddings")
    plain.word_embeddings = own = nn.Embedding(2, 2)
    assert plain.word_embeddings is own


class Classifier(nn.Module):
    """A user's model that holds another one as `base_model`."""

    def __init__(self, name: str = "base_model") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.head = name, nn.Linear(4, 2)
        self.add_module(name, nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x: Any) -> Any:
        return self.head(getattr(self, self.name)(x))


def test_a_module_that_the_model_itself_calls_base_model_computes_as_in_peft(tmp_path: Path) -> None:
    x, outputs = torch.ones(1, 4), []
    theirs = peft.get_peft_model(Classifier(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    for library in (peft, peftcore):
        model = library.PeftModel.from_pretrained(Classifier(), tmp_path)
        assert type(model.base_model).__name__ == "LoraModel"
        outputs += [model(x), model.merge_and_unload()(x)]
    torch.testing.assert_close(outputs[2:], outputs[:2])
    assert not torch.equal(outputs[0], Classifier()(x))


@pytest.mark.parametrize("name", ["merged", "active_adapter"])
def test_a_module_that_an_attribute_would_hide_is_refused(name: str) -> None:
    model, config = Classifier(name), peftcore.LoraConfig(r=2, target_modules=["0"])
    with pytest.raises(peftcore.ConfigError, match=f"Classifier has a module or a tensor named '{name}'"):
        peftcore.get_peft_model(model, config)
    assert isinstance(peftcore.inject_adapter_in_model(config, model)(torch.ones(1, 4)), torch.Tensor)


def test_the_arguments_that_only_adapters_take_are_those_of_peft() -> None:
    models: list[Any] = [
        lib.get_peft_model(nn.Sequential(nn.Linear(2, 2)), lib.LoraConfig(target_modules=["0"]))
        for lib in (peftcore, peft)
    ]
    assert models[0].special_peft_forward_args == models[1].special_peft_forward_args
