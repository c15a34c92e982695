"""The functions of `peft.utils.hotswap` take HF PEFT's arguments in their order."""

import inspect
from typing import Any

import pytest
from peft.utils import hotswap as of_peft

from peftcore.hf_peft.utils import hotswap


@pytest.mark.parametrize("name", hotswap.__all__)
def test_the_arguments_are_those_of_peft(name: str) -> None:
    ours, theirs = getattr(hotswap, name), getattr(of_peft, name)
    assert arguments(ours) == arguments(theirs)


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
