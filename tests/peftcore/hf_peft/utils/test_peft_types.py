"""`peft.utils.peft_types`: the methods and tasks that HF PEFT names."""

import pytest
from peft.utils import peft_types as of_peft

from peftcore.hf_peft.utils import peft_types


@pytest.mark.parametrize("name", peft_types.__all__)
def test_members_have_pefts_names_and_values(name: str) -> None:
    ours, theirs = ({member.name: member.value for member in getattr(module, name)} for module in (peft_types, of_peft))
    assert theirs.items() <= ours.items()


def test_a_member_equals_its_text() -> None:
    assert peft_types.PeftType.LORA == "LORA"
    assert peft_types.TaskType("CAUSAL_LM") is peft_types.TaskType.CAUSAL_LM
