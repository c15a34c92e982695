from importlib.util import find_spec

import peft.import_utils as theirs
import pytest

import peftcore.hf_peft.import_utils as ours


@pytest.mark.parametrize(
    "name", [name for name in ours.__all__ if name not in ("is_gptqmodel_available", "is_torchao_available")]
)
def test_each_answer_is_that_of_peft(name: str) -> None:
    answers = [getattr(module, name) for module in (ours, theirs)]
    assert len({answer() if callable(answer) else bool(answer) for answer in answers}) == 1


def test_a_package_counts_as_available_if_it_can_be_found() -> None:
    assert ours.is_bnb_available() is (find_spec("bitsandbytes") is not None)
