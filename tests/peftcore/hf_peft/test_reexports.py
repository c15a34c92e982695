"""A name can be imported from each module that has it in HF PEFT."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import peft
import pytest

from peftcore import hf_peft
from peftcore.hf_peft.reexports import _PACKAGE, _SINGLE_NAMES, _SOURCES, reexported

MODULES = [module.name.removeprefix("peft.") for module in pkgutil.walk_packages(peft.__path__, "peft.")]


def shared_names() -> set[str]:
    names = {name for source in _SOURCES for name in importlib.import_module(f"{_PACKAGE}.{source}").__all__}
    return names | set(_SINGLE_NAMES) | set(hf_peft.__all__)


def imported_names(module: ModuleType) -> set[str]:
    """Return the classes and functions of HF PEFT that a module of HF PEFT imports from another."""
    members = inspect.getmembers(module, lambda one: inspect.isclass(one) or inspect.isfunction(one))
    return {name for name, one in members if one.__module__.startswith("peft.") and one.__module__ != module.__name__}


def test_a_name_that_exists_is_in_each_place_of_peft() -> None:
    shared, missing = shared_names(), []
    for path in MODULES:
        try:
            theirs = importlib.import_module(f"peft.{path}")
        except ImportError:
            continue  # needs a package that is not installed
        try:
            ours = importlib.import_module(f"peftcore.{path}")
        except ModuleNotFoundError:
            continue
        missing += [f"{path}.{name}" for name in imported_names(theirs) & shared if not hasattr(ours, name)]
    assert missing == []


def test_a_name_is_the_same_object_in_each_place() -> None:
    import peftcore.peft_model as peft_model
    from peftcore.tuners.boft.layer import LoraLayer, transpose
    from peftcore.tuners.lora.layer import BaseTunerLayer, PeftConfig

    import peftcore
    from peftcore.hf_peft.tuners import lora, tuners_utils
    from peftcore.hf_peft.utils import WEIGHTS_NAME, other

    assert peft_model.set_peft_model_state_dict is peftcore.set_peft_model_state_dict
    assert peft_model.WEIGHTS_NAME == WEIGHTS_NAME
    assert LoraLayer is lora.LoraLayer and transpose is other.transpose
    assert BaseTunerLayer is tuners_utils.BaseTunerLayer and PeftConfig is peftcore.PeftConfig


@pytest.mark.parametrize("name", ["no_such_name", "__wrapped__", "_SOURCES"])
def test_other_names_are_nowhere(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'peftcore.hf_peft.config' has no attribute '{name}'"):
        reexported("peftcore.hf_peft.config", name)
