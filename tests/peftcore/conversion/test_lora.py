"""The configuration of a converted LoRA targets its own layers alone."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftcore import (
    AdaLoraConfig,
    PeftModel,
    get_peft_model,
)
from peftcore.conversion import save_as_lora
from peftcore.injection.adapter_set import adapter_set

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the oracle warns of on import is its own affair
    import peft


class Nested(nn.Module):
    """A layer's path ends another's, as in a model inside of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.tanh(self.inner["proj"](x)))


@pytest.mark.filterwarnings("ignore")  # the oracle's own
def test_a_name_that_ends_another_means_itself_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(3, 6)
    model = get_peft_model(
        copy.deepcopy(base), AdaLoraConfig(init_r=3, target_r=1, total_step=2, target_modules=["proj"])
    )
    layers: Any = adapter_set(model).of_method("default")
    torch.nn.init.ones_(layers["proj"].lora_E_weight)
    for name, kept in (("proj", [True, False, True]), ("inner.proj", [False] * 3)):
        layers[name].kept = torch.tensor(kept)
        with torch.no_grad():
            layers[name]._silence_dropped()
    save_as_lora(tmp_path, model)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(there(x), model(x))
    assert not torch.equal(model(x), base(x))
