"""Which adapters an adapter store puts into one slot, and the options that are not saved."""

import dataclasses
from typing import Any

import peft
import pytest
import torch

import peftcore
from peftcore import ConfigError, IA3Config, LoraConfig, LoraRuntimeConfig, PeftConfig

PLAIN = {"r": 4, "target_modules": ["q_proj"]}


def test_equal_plain_loras_share_a_slot_whatever_their_base_is_called() -> None:
    assert LoraConfig(**PLAIN).can_be_overwritten_by(
        LoraConfig(**PLAIN, base_model_name_or_path="here", inference_mode=True)
    )


@pytest.mark.parametrize(
    "other",
    [
        LoraConfig(r=8, target_modules=["q_proj"]),
        LoraConfig(**PLAIN, use_rslora=True),
        LoraConfig(**PLAIN, modules_to_save=["norm"]),
        LoraConfig(**PLAIN, bias="all"),
        LoraConfig(**PLAIN, init_lora_weights="pissa"),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
)
def test_other_adapters_get_a_slot_of_their_own(other: PeftConfig) -> None:
    assert not other.can_be_overwritten_by(LoraConfig(**PLAIN))


def test_runtime_options_are_not_saved() -> None:
    assert LoraConfig().runtime_config == LoraRuntimeConfig(ephemeral_gpu_offload=False)
    assert "runtime_config" not in LoraConfig().to_dict()
    assert "runtime_config" not in LoraConfig().to_json()
    saved = {**LoraConfig().to_dict(), "runtime_config": {"ephemeral_gpu_offload": True}}
    with pytest.warns(UserWarning, match="runtime_config is ignored"):
        read = PeftConfig.from_dict(saved, from_disk=True)
    assert read == LoraConfig()


def test_offloading_that_cannot_act_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload=True needs a CUDA device, and PyTorch finds none"):
        LoraRuntimeConfig(ephemeral_gpu_offload=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    LoraConfig(use_dora=True, runtime_config=runtime)
    with pytest.warns(UserWarning, match="ephemeral_gpu_offload acts on use_dora=True only"):
        LoraConfig(runtime_config=runtime)
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload must be True or False"):
        LoraRuntimeConfig(ephemeral_gpu_offload="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["loftq", "eva", "corda", "lora_ga"])
def test_options_of_another_start_warn(start: str) -> None:
    with pytest.warns(UserWarning, match=f"{start}_config has no effect with init_lora_weights=True"):
        LoraConfig(**{f"{start}_config": {"some": 1}})


def test_layer_classes_of_a_script_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"\['Linear'\] cannot get layers of a script's own.*register_storage"):
        LoraConfig()._register_custom_module({torch.nn.Linear: torch.nn.Module})


def test_a_rank_with_its_count_is_read_if_a_pattern_names_the_ranks() -> None:
    """HF PEFT's converter of kohya_ss files writes such configurations."""
    given: dict[str, Any] = {"r": [4, 24], "lora_alpha": [32.0, 24], "target_modules": ["q"]}
    patterns = {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 32.0}}
    config: Any = LoraConfig.from_dict({"peft_type": "LORA", **given, **patterns})
    assert (config.r, config.lora_alpha) == (4, 32.0)
    with pytest.raises(ConfigError, match=r"r must be an integer; got \[4, 24\]"):
        LoraConfig(**given)


@pytest.mark.parametrize("library", [peftcore, peft])
def test_the_fields_of_a_configuration_make_another(library: Any) -> None:
    fields = dataclasses.asdict(library.LoraConfig(r=2))
    assert fields["runtime_config"] == {"ephemeral_gpu_offload": False}
    assert dataclasses.asdict(library.LoraConfig(**fields)) == fields
