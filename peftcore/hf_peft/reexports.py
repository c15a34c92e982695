"""Names that HF PEFT's modules import from each other, so that scripts can import them from several places.

An example is `from peft.peft_model import set_peft_model_state_dict`. A module here calls `reexported` for names that
it does not define.
"""

from importlib import import_module
from typing import Any

_PACKAGE = "peftcore.hf_peft"
_SOURCES = (
    "utils",
    "utils.other",
    "utils.constants",
    "utils.save_and_load",
    "utils.integrations",
    "utils.merge_utils",
    "utils.error",
    "utils.warning",
    "mapping",
    "config",
    "tuners._buffer_dict",
    "tuners.mixed",
    "tuners.tuners_utils",
)
"""Modules whose names can be imported from all others."""
_SINGLE_NAMES = {
    "LoraLayer": "tuners.lora",
    **dict.fromkeys(("LycorisConfig", "LycorisLayer", "LycorisTuner"), "tuners.lycoris_utils"),
    "MultitaskPromptEmbedding": "classes",
}
"""{name that can be imported from all modules: its module, whose other names cannot}"""


def reexported(module: str, name: str) -> Any:
    """Return a name that another module of HF PEFT defines.

    Args:
        module: the full name of the module from which the name is imported.
        name: the name.

    Raises:
        AttributeError: there is no such name.
    """
    if not name.startswith("__"):
        if name in _SINGLE_NAMES and module != (defining := f"{_PACKAGE}.{_SINGLE_NAMES[name]}"):
            return getattr(import_module(defining), name)
        for source in (f"{_PACKAGE}.{source}" for source in _SOURCES):
            if source != module and name in import_module(source).__all__:
                return getattr(import_module(source), name)
        if name in import_module(_PACKAGE).__all__:
            return getattr(import_module("peftcore"), name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
