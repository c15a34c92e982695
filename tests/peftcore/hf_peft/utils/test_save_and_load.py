"""`peft.utils.save_and_load`: HF PEFT's arguments in their order, and a state dict that comes from HF PEFT."""

from typing import Any

import peft
import pytest
import torch
from peft.utils import save_and_load as of_peft
from signatures import arguments
from torch import nn

import peftcore
from peftcore.hf_peft.utils import save_and_load


@pytest.mark.parametrize("name", save_and_load.__all__)
def test_the_arguments_are_those_of_peft(name: str) -> None:
    assert arguments(getattr(save_and_load, name)) == arguments(getattr(of_peft, name))


def test_a_state_dict_of_peft_is_set_here() -> None:
    def model(library: Any) -> Any:
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        return library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

    theirs, ours = model(peft), model(peftcore)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    state = of_peft.get_peft_model_state_dict(theirs)
    save_and_load.set_peft_model_state_dict(ours, state)
    again = save_and_load.get_peft_model_state_dict(ours)
    assert state.keys() == again.keys()
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("prefix", ["lora_", "ia3_"])
def test_the_adapters_name_enters_keys_as_in_peft(prefix: str) -> None:
    keys = [
        "q.lora_A.weight",
        "q.lora_magnitude_vector",
        "q.ia3_l",
        "lora_net.ia3_l",
        "score.weight",
        "q.lora_A.0.weight",
    ]
    state = {key: torch.ones(1) for key in keys}
    ours, theirs = (one._insert_adapter_name_into_state_dict(state, "b", prefix) for one in (save_and_load, of_peft))
    assert list(ours) == list(theirs)
