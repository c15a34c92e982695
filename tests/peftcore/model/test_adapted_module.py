"""The configurations of a model's adapters, and the names of the active ones."""

from typing import Any

from peftcore import LoraConfig


def test_active_adapters_are_a_list_and_a_method(model: Any) -> None:
    model.set_adapter(["b", "a"])
    assert model.active_adapters == model.active_adapters() == ["b", "a"]
    assert model.active_adapter == "b"
    model.set_adapter([])
    assert model.active_adapters == []
    assert model.active_adapter == ""


def test_each_adapter_has_its_configuration(model: Any) -> None:
    assert list(model.peft_config) == ["a", "b"]
    assert all(isinstance(config, LoraConfig) for config in model.peft_config.values())
    assert model.peft_config["b"].target_modules == {"down_proj"}
