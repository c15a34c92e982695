"""HF PEFT's public names, in the places from which scripts import them.

This package is what `import peft` finds after `import peftcore.as_peft`, and `peftcore.tuners`, `peftcore.utils` and
the other submodules of HF PEFT are its submodules. The classes and functions are peftcore's own.
"""

from typing import Any

import peftcore

__version__ = "0.21.2"
"""The version of HF PEFT whose names and meanings this package has."""

SUBMODULES = (
    "auto",
    "functional",
    "helpers",
    "import_utils",
    "mapping",
    "mapping_func",
    "mixed_model",
    "optimizers",
    "peft_model",
    "tuners",
    "utils",
)
"""Submodules of HF PEFT that `peftcore` has under the same name, besides `config`."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(peftcore, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(peftcore)})
