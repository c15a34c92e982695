"""Facts about the adapters of a model."""

from typing import Any

import pytest
import torch
from torch import nn

from peftcore import (
    AdaptionPromptConfig,
    ConfigError,
    LoraConfig,
    LoReftConfig,
    PromptTuningConfig,
    ShadowConfig,
    get_peft_model,
)


def test_an_inactive_adapter_counts_among_all_parameters_alone(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = {name: sum(p.numel() for n, p in model.named_parameters() if f".{name}." in n) for name in "ab"}
    base = sum(p.numel() for p in model.parameters()) - sum(adapters.values())
    assert adapters == {"a": 2 * 8 * (8 + 8), "b": 8 * (8 + 8)}
    assert model.get_nb_trainable_parameters() == (adapters["a"], base + adapters["a"] + adapters["b"])
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 256 || all params: ")


def test_ranks_and_targets(model: Any) -> None:
    assert model.adapter_ranks() == {f"model.layers.0.self_attn.{name}": 8 for name in ("q_proj", "v_proj")}
    assert model.adapter_ranks("b") == {"model.layers.0.mlp.down_proj": 8}
    assert sorted(model.targeted_module_names) == sorted([*model.adapter_ranks("a"), *model.adapter_ranks("b")])
    assert model.targeted_parameter_names == []
    assert model.active_peft_config is model.peft_config["a"]
    assert model.peft_type == "LORA"


def test_status_of_layers_and_model(model: Any) -> None:
    assert {layer.name for layer in model.get_layer_status()} == {
        f"model.{name}" for name in model.targeted_module_names
    }
    status = model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (["a"], ["a", "b"])


def test_modules_to_save_of_all_adapters_and_the_dtype(model: Any) -> None:
    assert model.modules_to_save is None
    assert model.base_model_torch_dtype == torch.float32
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.modules_to_save == {"lm_head"}
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert plain.base_model_torch_dtype is None


def test_a_lora_is_convertible_to_lora(model: Any) -> None:
    assert model.supports_lora_conversion("a")


@pytest.mark.parametrize("read", [lambda model: model.active_peft_config, lambda model: model.get_prompt(1)])
def test_without_an_active_adapter_an_error_names_set_adapter(model: Any, read: Any) -> None:
    model.set_adapter([])
    with pytest.raises(ConfigError, match="no adapter is active; call set_adapter with one of a, b"):
        read(model)


@pytest.mark.parametrize(
    "config",
    [
        AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
        LoReftConfig(task_type="CAUSAL_LM"),
        ShadowConfig(task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.method,
)
def test_a_prompt_without_embeddings_has_none_to_save(model: Any, config: Any) -> None:
    other = get_peft_model(model.unload(), config)
    with pytest.raises(ConfigError, match=f"'default' is {config.method}, which has no prompt embeddings"):
        other.get_prompt_embedding_to_save("default")
    assert other.get_adapter_state_dict("default")


def test_the_prompt_of_a_batch(model: Any) -> None:
    with pytest.raises(ConfigError, match="'a' is LORA, which adds no prompt"):
        model.get_prompt(2)
    with pytest.raises(ConfigError, match="'a' is LORA, which has no prompt embeddings"):
        model.get_prompt_embedding_to_save("a")
    assert not hasattr(model, "prompt_encoder")
    prompted = get_peft_model(model.unload(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    saved = prompted.get_prompt_embedding_to_save("default")
    assert saved.shape == (3, 8)
    torch.testing.assert_close(prompted.get_prompt(2), saved.expand(2, 3, 8))
    assert list(prompted.prompt_encoder) == ["default"]
    with pytest.raises(ConfigError, match="max_cache_len must be None"):
        prompted.get_prompt(2, max_cache_len=4)
