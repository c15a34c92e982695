"""`peft.utils.error.PeftError` catches the errors of this library."""

import pytest
from torch import nn

from peftcore import LoraConfig, get_peft_model
from peftcore.hf_peft.utils.error import PeftError


def test_an_error_of_a_function_is_a_peft_error() -> None:
    with pytest.raises(PeftError, match="no_such"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["no_such"]))
