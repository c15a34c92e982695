"""Refusal of HF PEFT's own objects: its configurations and models do not fit peftcore's functions."""

from collections.abc import Iterable
from typing import Any

from peftcore.errors import ConfigError

_ADVICE = (
    "objects of peftcore and of HF PEFT cannot be mixed; import all names from peftcore, or make "
    "`import peftcore.as_peft` the first line of the script"
)


def is_of_hf_peft(kind: type) -> bool:
    """Return True for a class of HF PEFT, or a class that is derived from one."""
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def refuse_hf_peft(value: Any) -> None:
    """Raise ConfigError if a value is an object of HF PEFT.

    Args:
        value: an argument of a public function.
    """
    if is_of_hf_peft(kind := type(value)):
        raise ConfigError(f"peftcore got an object of HF PEFT, a {kind.__module__}.{kind.__name__}; {_ADVICE}")


def refuse_layers_of_hf_peft(modules: Iterable[Any]) -> None:
    """Raise ConfigError if a module of a model is HF PEFT's.

    Args:
        modules: the modules of a model.
    """
    for kind in {type(module) for module in modules}:
        if is_of_hf_peft(kind):
            raise ConfigError(
                f"the model has adapters of HF PEFT already, in a {kind.__module__}.{kind.__name__}; {_ADVICE}. To go "
                "on with the base, call merge_and_unload() or unload() of HF PEFT first"
            )
