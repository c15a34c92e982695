"""A plain LoRA replaces adapters that only add ΔW, and the model says which ones those are."""

import pytest
from conversion_models import llama, random_adapter

from peftcore import (
    AdapterNameError,
    ConfigError,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MergeError,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peftcore.errors import ConversionError
from peftcore.merging.convertible import check_convertible


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (LoHaConfig(target_modules=["q_proj"], r=2), True),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), True),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), True),
        (LNTuningConfig(target_modules=["norm"]), False),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3]), False),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), False),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), False),
    ],
)
@pytest.mark.filterwarnings("ignore:lora_bias:peftcore.errors.PeftWarning")  # q_proj has no bias
def test_the_model_says_what_the_conversion_does(config: PeftConfig, fits: bool) -> None:
    model = random_adapter(config) if fits else get_peft_model(llama(), config)
    assert model.supports_lora_conversion() is fits
    if fits:
        check_convertible(model, "default")
    else:
        with pytest.raises((ConversionError, MergeError)):
            check_convertible(model, "default")


def test_a_merged_adapter_is_convertible_after_unmerging() -> None:
    model = random_adapter(LoHaConfig(target_modules=["q_proj"], r=2))
    model.merge_adapter()
    assert model.supports_lora_conversion()
    with pytest.raises(MergeError, match="call unmerge_adapter first"):
        check_convertible(model, "default")


def test_an_error_of_the_kind_of_the_model_or_of_the_adapter_is_a_type_error() -> None:
    assert issubclass(ConversionError, TypeError) and issubclass(ConversionError, ConfigError)
    with pytest.raises(ConversionError, match="LlamaForCausalLM has no adapters"):
        check_convertible(llama(), "default")
    with pytest.raises(AdapterNameError, match="other"):
        check_convertible(random_adapter(LoHaConfig(target_modules=["q_proj"], r=2)), "other")
