"""The public functions with their arguments, and the record of which test varies which argument."""

import dataclasses
import enum
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import peftcore
from peftcore.config import PeftConfig
from peftcore.hf_peft.auto import _BaseAutoPeftModel
from peftcore.injection.tuner_model import TunerModel
from peftcore.layers.peft_attributes import PeftLayerAttributes

SUBMODULES = ("functional", "helpers", "optimizers", "preprocess", "utils.hotswap")
"""Modules of `peftcore.hf_peft` whose functions are public, too."""
HOOKS = {
    *("can_be_overwritten_by", "class_for", "one_of", "peft_attribute", "positive", "probability"),
    *("regular_expression", "schedule_options", "take_factors"),
}
"""Methods that the core calls, and no user."""
CHECKED: dict[str, set[str]] = {}
"""{function: arguments that a test varies}, filled by `checks`."""

F = TypeVar("F", bound=Callable[..., Any])


def checks(function: str, arguments: str) -> Callable[[F], F]:
    """Return a decorator of a test that calls a function with arguments at other values than their defaults.

    Args:
        function: the function's qualified name, such as "PeftModel.set_adapter".
        arguments: names of the arguments, separated by spaces.
    """

    def note(test: F) -> F:
        CHECKED.setdefault(function, set()).update(arguments.split())
        return test

    return note


def arguments_of(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's arguments, without self and cls."""
    return set(inspect.signature(function).parameters) - {"self", "cls", "mcs"}


def _methods_of(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, method in inspect.getmembers(kind, callable):
        of_library = (getattr(method, "__module__", None) or "").startswith("peftcore")
        if name.startswith("_") or not of_library or inspect.isclass(method):
            continue
        # the methods of PeftModel are written in its base classes, one for each subject
        yield f"PeftModel.{name}" if kind is peftcore.PeftModel else method.__qualname__, method


def public_functions() -> dict[str, Callable[..., Any]]:
    """Return {qualified name: function} of every public function and method, each of which is written once."""
    found: dict[str, Callable[..., Any]] = {}
    for name in peftcore._MODULES:
        value = getattr(peftcore, name)
        if not callable(value):
            continue
        if not inspect.isclass(value):
            found[value.__qualname__] = value
        elif issubclass(value, TunerModel | _BaseAutoPeftModel | peftcore.PeftModel | peftcore.AdapterStore):
            found |= dict(_methods_of(value))
            if (init := vars(value).get("__init__")) is not None:
                found[init.__qualname__] = init
        elif type(value) is not type and not issubclass(value, enum.Enum):
            made = type(value).__call__
            found[made.__qualname__] = made
        elif not dataclasses.is_dataclass(value) and not issubclass(
            value, enum.Enum | Exception | peftcore.AdapterLayer
        ):
            found[value.__init__.__qualname__] = value.__init__
    found["TunerModel.__init__"] = TunerModel.__init__
    found["PeftModel.__call__"] = peftcore.PeftModel.__call__
    methods = {**dict(_methods_of(PeftConfig)), **dict(_methods_of(PeftLayerAttributes))}
    base = {n: m for n, m in methods.items() if n.split(".")[1] not in HOOKS}
    found |= base
    for submodule in SUBMODULES:
        module = importlib.import_module(f"peftcore.hf_peft.{submodule}")
        functions = (f for name in module.__all__ if inspect.isfunction(f := getattr(module, name)))
        found |= {f.__qualname__: f for f in functions}
    return {name: function for name, function in found.items() if arguments_of(function)}
