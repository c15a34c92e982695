from itertools import permutations

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import peftcore
from peftcore import (
    AdaLoraConfig,
    AdaLoraModel,
    LoraConfig,
    LoraModel,
    MultitaskPromptTuningConfig,
    PromptTuningConfig,
    convert_to_lora,
    get_eva_state_dict,
    get_peft_model,
)
from peftcore.errors import ConfigError, HotswapError
from peftcore.hf_peft.config import PeftConfigMixin, PromptLearningConfig
from peftcore.storage.hotswap import prepare_model_for_compiled_hotswap


def test_every_configuration_has_the_base_classes_that_it_has_in_hf_peft() -> None:
    assert isinstance(LoraConfig(), PeftConfigMixin)
    assert isinstance(PromptTuningConfig(num_virtual_tokens=1), PromptLearningConfig)
    assert not issubclass(LoraConfig, PromptLearningConfig)


def test_classes_derive_from_each_other_as_in_hf_peft() -> None:
    configurations = {n for n in dir(peft) if n.endswith("Config") and isinstance(getattr(peft, n), type)}
    models = {n for n in dir(peft) if n.endswith("Model") and issubclass(getattr(peft, n), BaseTuner)}
    for names in (configurations & set(peftcore.__all__), models & set(peftcore.__all__)):
        assert len(names) > 30
        for one, other in permutations(names, 2):
            expected = issubclass(getattr(peft, one), getattr(peft, other))
            assert issubclass(getattr(peftcore, one), getattr(peftcore, other)) == expected, (one, other)


def test_a_configuration_of_adalora_is_one_of_lora_for_scripts() -> None:
    adalora = AdaLoraConfig(total_step=9)
    assert isinstance(adalora, LoraConfig) and not isinstance(LoraConfig(), AdaLoraConfig)
    assert isinstance(MultitaskPromptTuningConfig(num_virtual_tokens=1), PromptTuningConfig)

    class OwnLoraConfig(LoraConfig):
        pass

    assert isinstance(OwnLoraConfig(), LoraConfig) and not isinstance(adalora, OwnLoraConfig)


def test_options_of_lora_are_not_expected_of_adalora() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), AdaLoraConfig(target_modules=["0"], total_step=9, init_lora_weights=False)
    )
    assert isinstance(model.base_model, LoraModel) and isinstance(model.base_model, AdaLoraModel)
    with pytest.raises(ConfigError, match="EVA starts a LoRA; got AdaLoraConfig"):
        get_eva_state_dict(model, [{"input": torch.ones(1, 4)}])
    with pytest.raises(HotswapError, match="got AdaLoraConfig"):
        prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config["default"])
    assert convert_to_lora(model, 2)[0].r == 2  # looks for variants of LoRA, to warn of a plain LoRA
