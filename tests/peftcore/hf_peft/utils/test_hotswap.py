"""The functions of `peft.utils.hotswap` take HF PEFT's arguments in their order."""

import pytest
from peft.utils import hotswap as of_peft
from signatures import arguments

from peftcore.hf_peft.utils import hotswap


@pytest.mark.parametrize("name", hotswap.__all__)
def test_the_arguments_are_those_of_peft(name: str) -> None:
    assert arguments(getattr(hotswap, name)) == arguments(getattr(of_peft, name))
