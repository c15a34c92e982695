from peftcore import LoraConfig, PromptTuningConfig
from peftcore.hf_peft.config import PeftConfigMixin, PromptLearningConfig


def test_every_configuration_has_the_base_classes_that_it_has_in_hf_peft() -> None:
    assert isinstance(LoraConfig(), PeftConfigMixin)
    assert isinstance(PromptTuningConfig(num_virtual_tokens=1), PromptLearningConfig)
    assert not issubclass(LoraConfig, PromptLearningConfig)
