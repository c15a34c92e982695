"""Tools for trainers that shard a model."""

from typing import Any

import pytest
import torch
from peft.utils import other as of_peft
from peftcore.utils.other import fsdp_auto_wrap_policy, transpose
from quiet_training import tiny_llama
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from peftcore import ConfigError, LoraConfig, get_peft_model
from peftcore.hf_peft import utils
from peftcore.hf_peft.utils import other


def wrapped(policy, model: nn.Module) -> set[type]:
    """Return the classes of the modules that FSDP would wrap."""
    kinds = {type(m) for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
    assert policy(module=model, recurse=True, nonwrapped_numel=0)
    return kinds


def test_blocks_are_wrapped_with_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2))
    assert wrapped(fsdp_auto_wrap_policy(model), model) == {LlamaDecoderLayer}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,LlamaDecoderLayer")
    assert wrapped(fsdp_auto_wrap_policy(model), model) == {LlamaDecoderLayer, LlamaMLP}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "GPT2Block")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no module of the class GPT2Block"):
        fsdp_auto_wrap_policy(model)


def test_a_model_without_named_blocks_is_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert wrapped(fsdp_auto_wrap_policy(model), model) == set()


def test_a_weight_is_transposed_for_layers_that_store_their_inputs_first() -> None:
    weight = nn.Parameter(torch.randn(2, 3), requires_grad=False)
    assert transpose(weight, fan_in_fan_out=False) is weight
    turned = transpose(weight, fan_in_fan_out=True)
    assert isinstance(turned, nn.Parameter) and torch.equal(turned, weight.T) and not turned.requires_grad
    assert type(transpose(weight.detach(), True)) is torch.Tensor


@pytest.mark.parametrize("path", ["m.0.q", "m.10.q", "q", "m.0.xq", "m.1.k"])
def test_the_key_of_a_pattern_is_that_of_peft(path: str) -> None:
    keys = [r"0\.q", "q", r"m\.[01]\.k"]
    assert other.get_pattern_key(keys, path) == of_peft.get_pattern_key(keys, path)


def test_the_quantisation_of_a_model_is_that_of_peft() -> None:
    model: Any = tiny_llama()
    assert other.get_quantization_config(model, "gptq") is of_peft.get_quantization_config(model, "gptq") is None
    model.quantization_method, model.config.quantization_config = "gptq", {"bits": 4}
    for method in ("gptq", "awq"):
        expected = of_peft.get_quantization_config(model, method)
        assert other.get_quantization_config(model, method) == expected


@pytest.mark.parametrize("module", [other, utils])
def test_names_that_scripts_import_from_here(module: Any) -> None:
    for name in ("_get_submodules", "get_quantization_config", "shift_tokens_right", "transpose"):
        assert hasattr(of_peft, name) and hasattr(module, name)
    assert module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("key", ["q_proj", "layers.0.q_proj", "layers.0.xq_proj", "q_proj.x"])
def test_names_and_patterns_match_paths_as_in_peft(key: str) -> None:
    assert other._is_valid_match(key, "q_proj") == of_peft._is_valid_match(key, "q_proj")
    pattern = r".*\.q_proj"
    assert bool(other.match_target_against_key(pattern, key)) == bool(of_peft.match_target_against_key(pattern, key))


def test_an_adapter_is_frozen_as_in_peft() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    other._freeze_adapter(model, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="other"):
        other._freeze_adapter(model, "other")


def test_the_rows_of_inputs_are_counted() -> None:
    ids, embeddings = torch.ones(2, 3), torch.ones(4, 3, 2)
    for module in (other, of_peft):
        assert [module._get_batch_size(ids, None), module._get_batch_size(None, embeddings)] == [2, 4]
        with pytest.raises(ValueError, match="input_ids or input"):
            module._get_batch_size(None, None)


def test_a_models_embeddings_and_undivided_blocks_are_those_of_peft() -> None:
    for model in (tiny_llama(), nn.Sequential(nn.Linear(2, 2))):
        assert other._get_input_embeddings_name(model, "none") == of_peft._get_input_embeddings_name(model, "none")
        assert other._get_no_split_modules(model) == set(of_peft._get_no_split_modules(model))
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2))
    assert other._get_input_embeddings_name(adapted) == "model.embed_tokens"


def test_tensors_of_one_memory_have_one_id() -> None:
    whole = torch.ones(4, 2)
    assert other.id_tensor_storage(whole[:2]) == other.id_tensor_storage(whole) == of_peft.id_tensor_storage(whole)
    assert other.id_tensor_storage(whole.clone()) != other.id_tensor_storage(whole)


@pytest.mark.parametrize("word", ["Yes", "true", "1", "off", "N", "0", "maybe"])
def test_words_for_true_and_false_are_those_of_peft(word: str) -> None:
    if word == "maybe":
        with pytest.raises(ValueError, match="'maybe' is no word for true or false"):
            other.str_to_bool(word)
        return
    assert other.str_to_bool(word) == of_peft.str_to_bool(word)


def test_a_file_on_the_hub_is_there_or_not_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert other.check_file_exists_on_hf_hub("owner/name", "config.json") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []

    def file_exists(*args: Any, **kwargs: Any) -> bool:
        asked.append((args, kwargs))
        if args[1] == "broken":
            raise ConnectionError("no network")
        return args[1] == "config.json"

    monkeypatch.setattr(other, "file_exists", file_exists)
    assert other.check_file_exists_on_hf_hub("owner/name", "config.json", revision="v1") is True
    assert other.check_file_exists_on_hf_hub("owner/name", "other.json") is False
    assert asked[0] == (("owner/name", "config.json"), {"revision": "v1"})
    with pytest.warns(UserWarning, match="owner/name has broken: no network"):
        assert other.check_file_exists_on_hf_hub("owner/name", "broken") is None
