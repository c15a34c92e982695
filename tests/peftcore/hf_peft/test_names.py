"""Every public name of the installed HF PEFT exists here, with PEFT's arguments unless the table says otherwise."""

import inspect
from pathlib import Path
from typing import Any

import peft

import peftcore
from peftcore import hf_peft
from peftcore.hf_peft.names import DIFFERENT, NAMES, name_table

ROOT = Path(peftcore.__file__).parents[1]
FUNCTIONS = [name for name in sorted(peft.__all__) if inspect.isfunction(getattr(peft, name))]
METHODS_WITHOUT_A_PLACE = {
    "forward": "the base's own",
    "generate": "the base's own",
}
METHODS = [
    name
    for name, member in inspect.getmembers(peft.PeftModel, inspect.isfunction)
    if not name.startswith("_") and member.__module__.startswith("peft.") and name not in METHODS_WITHOUT_A_PLACE
]


def test_the_list_is_that_of_the_installed_version() -> None:
    assert hf_peft.__version__ == peft.__version__
    assert sorted(peft.__all__) == NAMES


def test_each_name_is_there() -> None:
    assert [name for name in NAMES if getattr(hf_peft, name) is not getattr(peftcore, name)] == []


def test_a_function_takes_the_arguments_of_peft_in_their_order() -> None:
    names = [name for name in FUNCTIONS if name not in DIFFERENT]
    theirs = {name: arguments(getattr(peft, name)) for name in names}
    assert {name: arguments(getattr(peftcore, name))[: len(theirs[name])] for name in names} == theirs


def test_a_method_of_the_model_takes_the_arguments_of_peft() -> None:
    for name in METHODS:
        ours, theirs = getattr(peftcore.PeftModel, name), getattr(peft.PeftModel, name)
        takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(ours).parameters.values())
        assert takes_more or set(arguments(theirs)) <= set(arguments(ours)), name


def arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_page_holds_the_table() -> None:
    page = (ROOT / "docs" / "peft-names.md").read_text()
    assert name_table() in page, "write the result of peftcore.hf_peft.names.name_table() into docs/peft-names.md"


def test_each_different_name_is_a_name() -> None:
    assert set(DIFFERENT) <= set(NAMES)
