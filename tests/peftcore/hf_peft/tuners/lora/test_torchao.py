"""The class of LoRA's layers on weights of torchao."""

from typing import Any

import pytest
from peft.tuners.lora.torchao import TorchaoLoraLinear as Theirs
from peftcore.tuners.lora import Linear
from peftcore.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from peftcore import LoraConfig, get_peft_model

quantization: Any = pytest.importorskip("torchao.quantization")


def test_layers_of_torchao_are_of_the_class_and_plain_layers_are_not() -> None:
    assert TorchaoLoraLinear.__name__ == Theirs.__name__
    plain = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantization.quantize_(plain[0], quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "1"]))
    assert [isinstance(layer, TorchaoLoraLinear) for layer in model] == [True, False]
    assert all(isinstance(layer, Linear) for layer in model)  # a base class, as in HF PEFT
