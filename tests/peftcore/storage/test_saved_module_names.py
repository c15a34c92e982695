"""Modules that train in full where HF PEFT's rule, ends of module names, matches more than whole path segments."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.files import MANIFEST
from peftcore.injection.adapter_set import adapter_set

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_hf_pefts_adapter_with_all_norms_gives_hf_pefts_logits(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert sum("modules_to_save" in name for name, _ in ours.named_parameters()) == 5  # two in each layer, and the last
    again = tmp_path / "again"
    ours.save_pretrained(again)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), again)(ids).logits, theirs(ids).logits)


def test_two_of_hf_pefts_adapters_with_all_norms_load_onto_one_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)


def test_a_saved_name_matches_the_same_modules_in_hf_peft(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["norm", "embed_tokens"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with pytest.warns(UserWarning, match="modules_to_save: 'norm' names model.norm here"):
        ours = get_peft_model(llama(), config)
    torch.nn.init.normal_(ours.get_submodule("model.norm").copies["default"].weight)
    ours.eval().save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert set(theirs.peft_config["default"].modules_to_save) == {"model.norm", "embed_tokens"}
    ids = torch.arange(12)[None]
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, ours(ids).logits)
    assert ours.peft_config["default"].modules_to_save == ["norm", "embed_tokens"]


def with_warnings(model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, LoraConfig(**options))
    return [str(warning.message) for warning in caught]


def test_modules_that_only_hf_peft_trains_are_named_with_what_to_add() -> None:
    messages = with_warnings(llama(), target_modules=["q_proj"], modules_to_save=["norm"])
    assert len(messages) == 1
    assert "model.layers.0.input_layernorm" in messages[0] and "and 1 more" in messages[0]
    longer = ["norm", "input_layernorm", "post_attention_layernorm"]  # what the message advises
    config: dict[str, Any] = {"target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**config, modules_to_save=["norm"]))
    with warnings.catch_warnings(action="error"):
        ours = get_peft_model(llama(), LoraConfig(**config, modules_to_save=longer))
    assert saved_modules(ours) == saved_modules(theirs)
    for names in (["model.norm"], ["lm_head"], ["embed_tokens", "lm_head"]):
        assert with_warnings(llama(), **config, modules_to_save=names) == []


def saved_modules(model: nn.Module) -> set[str]:
    paths = (path.partition(".modules_to_save")[0] for path, _ in model.named_parameters() if "modules_to_save" in path)
    return {path.removeprefix("base_model.model.") for path in paths}


def test_a_head_of_two_layers_of_which_one_is_named_warns_of_the_other() -> None:
    [message] = with_warnings(distilbert(), target_modules=["q_lin"], modules_to_save=["classifier"])
    assert "pre_classifier" in message
    assert with_warnings(distilbert(), target_modules=["q_lin"], task_type="SEQ_CLS") == []
    assert with_warnings(distilbert(), target_modules=["q_lin", "pre_classifier"], task_type="SEQ_CLS") == []


def distilbert() -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    config = DistilBertConfig(dim=16, hidden_dim=24, n_heads=2, n_layers=1, vocab_size=32)
    return DistilBertForSequenceClassification(config).eval()


def saved_heads(model: nn.Module) -> set[str]:
    names = (
        name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if "modules_to_save" in name
    )
    return {name.partition(".")[0] for name in names}


def test_both_untrained_layers_of_distilberts_head_train_as_in_hf_peft(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_lin"], "task_type": "SEQ_CLS", "r": 2}
    ids = torch.arange(12)[None]
    for library in (peft, peftcore):
        model = library.get_peft_model(distilbert(), library.LoraConfig(**options)).eval()
        assert saved_heads(model) == {"pre_classifier", "classifier"}
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / library.__name__)
        for reader in (peft, peftcore):
            again = reader.PeftModel.from_pretrained(distilbert(), tmp_path / library.__name__).eval()
            torch.testing.assert_close(again(ids).logits, model(ids).logits)
    everywhere = get_peft_model(distilbert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    assert saved_heads(everywhere) == {"pre_classifier", "classifier"}
    assert not any("classifier" in path for path in adapter_set(everywhere).layers)


def test_an_adapter_of_an_earlier_version_loads_without_the_layer_that_it_lacks(tmp_path: Path) -> None:
    """Earlier versions wrote ["classifier", "score"], and no `pre_classifier`."""
    config = LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS", r=2, init_lora_weights=False)
    model = get_peft_model(distilbert(), config).eval()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(weights).items() if "pre_classifier" not in key}, weights)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(written | {"modules_to_save": ["classifier", "score"]}), encoding="utf-8")
    (tmp_path / MANIFEST).unlink()
    ids = torch.arange(12)[None]
    for directory in (tmp_path, tmp_path / "again"):
        loaded = PeftModel.from_pretrained(distilbert(), directory).eval()
        assert saved_heads(loaded) == {"classifier"}
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        loaded.save_pretrained(tmp_path / "again")


def test_a_target_named_pre_classifier_is_adapted(tmp_path: Path) -> None:
    """Earlier versions wrote this list for "all-linear"."""
    config = LoraConfig(target_modules=["q_lin", "pre_classifier"], task_type="SEQ_CLS", r=2, init_lora_weights=False)
    model = get_peft_model(distilbert(), config).eval()
    assert saved_heads(model) == {"classifier"} and "pre_classifier" in adapter_set(model).layers
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(PeftModel.from_pretrained(distilbert(), tmp_path)(ids).logits, model(ids).logits)
