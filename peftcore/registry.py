"""Which adapter methods exist: `"LORA" -> (LoraConfig, Lora)`.

Every file of `peftcore.methods` and `peftcore.prompts` registers itself; a third-party package does the same through
an entry point of the group `peftcore.methods` that names its module and is called like its method.
"""

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from peftcore.config import PeftConfig, suggestion
from peftcore.errors import ConfigError

ENTRY_POINTS = "peftcore.methods"

Class = TypeVar("Class", bound=type[Any])


@dataclass(frozen=True)
class Method:
    """A registered method: its name on disk, its configuration class and its adapter class."""

    name: str
    config: type[PeftConfig]
    adapter: type[Any]


_methods: dict[str, Method] = {}


def register(name: str, config: type[PeftConfig]) -> Callable[[Class], Class]:
    """Class decorator: make an adapter class known as `name`, PEFT's `peft_type`."""

    def remember(adapter: Class) -> Class:
        config.peft_type = name
        _methods[name] = Method(name, config, adapter)
        return adapter

    return remember


@cache
def _discover() -> None:
    for name in ("peftcore.methods", "peftcore.prompts"):
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def methods() -> dict[str, Method]:
    """All registered methods by name, in alphabetical order."""
    _discover()
    return dict(sorted(_methods.items()))


def tuner_names() -> list[str]:
    """Names of the methods that adapt layers, found without importing any: each file is called like its method."""
    files = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "methods")])}
    others = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return sorted(name.upper() for name in files | others)


def method_named(name: str) -> Method:
    """The method, or a ConfigError that lists those there are."""
    _discover()
    if name not in _methods:
        raise ConfigError(f"unknown adapter method {name!r}{suggestion(str(name), list(_methods))}")
    return _methods[name]


def method_of(config: PeftConfig) -> Method:
    """The method that a configuration object belongs to."""
    if not isinstance(config, PeftConfig):
        raise ConfigError(
            f"an adapter is described by a configuration such as LoraConfig; got {type(config).__name__}; "
            "PeftConfig.from_dict makes one of a dictionary"
        )
    return method_named(config.peft_type)


def line_count(method: Method) -> int:
    """Lines of the method's own file, or of all files where it has a folder of its own."""
    file = Path(inspect.getfile(method.adapter))
    alone = file.parent.name in ("methods", "prompts")
    return sum(len(source.read_text().splitlines()) for source in ([file] if alone else file.parent.glob("*.py")))


def method_table() -> str:
    """Return a Markdown table of the registered methods, the one in docs/methods.md."""
    lines = ["| method | configuration | adapts | lines | what |", "|---|---|---|---|---|"]
    for method in methods().values():
        module = importlib.import_module(method.adapter.__module__)
        what = (module.__doc__ or "").strip().splitlines()[0]
        kinds = ", ".join(sorted(method.adapter.layer_kinds))
        lines.append(f"| {method.name} | `{method.config.__name__}` | {kinds} | {line_count(method)} | {what} |")
    return "\n".join(lines) + "\n"
