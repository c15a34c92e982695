"""`peft.utils.error.PeftError` catches the errors of this library."""

import pytest
from torch import nn

import peftcore
from peftcore import LoraConfig, get_peft_model
from peftcore.hf_peft.utils.error import NoMatchingPeftModuleError, PeftError
from peftcore.hf_peft.utils.warning import PeftWarning


def test_an_error_of_a_function_is_a_peft_error() -> None:
    with pytest.raises(PeftError, match="no_such") as caught:
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["no_such"]))
    assert isinstance(caught.value, NoMatchingPeftModuleError)


def test_the_class_of_warnings_is_the_library_s() -> None:
    assert PeftWarning is peftcore.PeftWarning
