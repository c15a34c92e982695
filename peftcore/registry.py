"""Registry of adapter methods: `"LORA" -> (LoraConfig, Lora)`.

Every file of `peftcore.methods` and `peftcore.prompts` registers itself. A third-party package registers its methods
through entry points of the group `peftcore.methods`: the entry's name is the method's, its value the module to import.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftcore._util.both_libraries import refuse_hf_peft
from peftcore._util.plugins import import_plugins
from peftcore.errors import ConfigError, UnknownMethodError, suggestion

if TYPE_CHECKING:
    from peftcore.config import PeftConfig

ENTRY_POINTS = "peftcore.methods"

Class = TypeVar("Class", bound=type[Any])


class PeftType(str, Enum):
    """Names of HF PEFT's methods on disk; `methods()` are those that exist here.

    As in HF PEFT, `str()` of a member is "PeftType.LORA", which scripts write into names of folders.
    """

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


@dataclass(frozen=True)
class Method:
    """A registered method: its name on disk, its configuration class and its adapter class."""

    name: str
    config: "type[PeftConfig]"
    adapter: type[Any]


_methods: dict[str, Method] = {}


def register(name: str, config: "type[PeftConfig]") -> Callable[[Class], Class]:
    """Return a class decorator that registers an adapter class.

    Args:
        name: The method's name on disk, PEFT's `peft_type`.
        config: The method's configuration class.
    """

    def add(adapter: Class) -> Class:
        config.peft_type, config.method = PeftType.__members__.get(name, name), name
        _methods[name] = Method(name, config, adapter)
        return adapter

    return add


def _discover() -> None:
    import_plugins(("peftcore.methods", "peftcore.prompts"), ENTRY_POINTS)


RENAMED = {
    "BONE": "it is MISS since 0.19. Write MISS as peft_type of adapter_config.json (and MiSS_only as bias, if it is "
    "bone_only), and load the adapter with key_mapping={'bone_block': 'miss_block'}; its outputs are the same",
}
"""{name of a method in older versions of HF PEFT: what to do}"""


def methods() -> dict[str, Method]:
    """Return all registered methods by name, in alphabetical order."""
    _discover()
    return dict(sorted(_methods.items()))


def tuner_names() -> list[str]:
    """Return the names of the methods that adapt layers, from file and entry point names, without imports."""
    files = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "methods")])}
    third_party = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return sorted(name.upper() for name in files | third_party)


def method_named(name: str) -> Method:
    """Return the method of this name.

    Raises:
        UnknownMethodError: For an unknown name. The message suggests a similar one.
    """
    _discover()
    if name not in _methods and name in RENAMED:
        raise UnknownMethodError(f"HF PEFT has renamed {name}: {RENAMED[name]}")
    if name not in _methods:
        raise UnknownMethodError(
            f"unknown adapter method {name!r}, which no installed package defines{suggestion(str(name), _methods)}"
        )
    return _methods[name]


def method_of(config: "PeftConfig") -> Method:
    """Return the method of a configuration object.

    Raises:
        ConfigError: If the object is not a configuration, or its method is unknown.
    """
    refuse_hf_peft(config)
    name = getattr(type(config), "peft_type", None)
    if isinstance(config, type) or not isinstance(name, str):
        kind = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise ConfigError(
            f"an adapter is described by a configuration such as LoraConfig(r=8); got {kind}; "
            "PeftConfig.from_dict creates one from a dictionary"
        )
    return method_named(name)


def method_table() -> str:
    """Return a Markdown table of the registered methods, the one in docs/methods.md."""
    lines = ["| method | configuration | adapts | equation and paper |", "|---|---|---|---|"]
    for method in methods().values():
        module = importlib.import_module(method.adapter.__module__)
        summary = (module.__doc__ or "").strip().splitlines()[0]
        kinds = ", ".join(sorted(method.adapter.layer_kinds))
        lines.append(f"| {method.name} | `{method.config.__name__}` | {kinds} | {summary} |")
    return "\n".join(lines) + "\n"
