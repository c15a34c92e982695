"""`peft.tuners.lora.monteclora`: the sampler is the module that a LoRA with `monteclora_config` holds."""

from torch import nn

from peftcore import LoraConfig, MontecloraConfig, get_peft_model
from peftcore.hf_peft.tuners.lora.monteclora import MontecloraSampler


def test_an_adapter_with_monteclora_holds_a_sampler() -> None:
    counts = []
    for options in ({}, {"monteclora_config": MontecloraConfig()}):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], **options))
        counts.append(sum(isinstance(module, MontecloraSampler) for module in model.modules()))
    assert counts == [0, 1]
