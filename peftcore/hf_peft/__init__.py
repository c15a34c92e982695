"""HF PEFT's public names, in the places from which scripts import them.

This package is what `import peft` finds after `import peftcore.as_peft`, and `peftcore.tuners`, `peftcore.utils` and
the other submodules of HF PEFT are its submodules. The classes and functions are peftcore's own.
"""

from importlib import import_module
from typing import Any

from peftcore.hf_peft.alias import SUBMODULES
from peftcore.hf_peft.names import NAMES

__all__ = list(NAMES)  # type: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":  # the version of HF PEFT whose names and meanings this package has
        return import_module("peftcore.config").__version__
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("peftcore"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *SUBMODULES, *dir(import_module("peftcore"))})
