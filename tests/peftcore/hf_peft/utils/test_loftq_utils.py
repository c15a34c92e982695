"""`peft.utils.loftq_utils`: HF PEFT's arguments in their order."""

import pytest
from peft.utils import loftq_utils as of_peft
from signatures import arguments

from peftcore.hf_peft.utils import loftq_utils


@pytest.mark.parametrize("name", loftq_utils.__all__)
def test_the_arguments_are_those_of_peft(name: str) -> None:
    assert arguments(getattr(loftq_utils, name)) == arguments(getattr(of_peft, name))
