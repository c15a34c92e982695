"""An adapter store reuses the slot of an adapter only if nothing but the weights differs."""

import pytest

from peftcore import IA3Config, LoraConfig, PeftConfig

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


@pytest.mark.parametrize("start", ["loftq", "eva", "corda", "lora_ga"])
def test_options_of_another_start_warn(start: str) -> None:
    with pytest.warns(UserWarning, match=f"{start}_config has no effect with init_lora_weights=True"):
        LoraConfig(**{f"{start}_config": {"some": 1}})
