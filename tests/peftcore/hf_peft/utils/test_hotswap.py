"""The functions of `peft.utils.hotswap` take HF PEFT's arguments in their order."""

import pytest
from peft.utils import hotswap as of_peft
from signatures import arguments

from peftcore import PeftType
from peftcore.hf_peft.utils import hotswap


def test_the_methods_whose_adapters_can_be_exchanged() -> None:
    for method, options in of_peft.CONFIG_KEYS_TO_CHECK.items():
        checked = hotswap.CONFIG_KEYS_TO_CHECK[PeftType(method.value)]
        assert set(options) - {"alpha_pattern"} <= set(checked)  # alpha may differ, also in patterns


@pytest.mark.parametrize("name", hotswap.__all__)
def test_the_arguments_are_those_of_peft(name: str) -> None:
    assert arguments(getattr(hotswap, name)) == arguments(getattr(of_peft, name))
