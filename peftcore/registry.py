"""Which adapter methods exist: `"LORA" -> (LoraConfig, Lora)`.

Every file of `peftcore.methods` and `peftcore.prompts` registers itself; a third-party package does the same through an entry point of the
group `peftcore.methods` that names its module.
"""

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from peftcore.config import PeftConfig, suggestion
from peftcore.errors import ConfigError

ENTRY_POINTS = "peftcore.methods"


@dataclass(frozen=True)
class Method:
    """A registered method: its name on disk, its configuration class and its adapter class."""

    name: str
    config: type[PeftConfig]
    adapter: type[Any]


_methods: dict[str, Method] = {}


def register(name: str, config: type[PeftConfig]) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: make an adapter class known as `name`, PEFT's `peft_type`."""

    def remember(adapter: type[Any]) -> type[Any]:
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


def method_named(name: str) -> Method:
    """The method, or a ConfigError that lists those there are."""
    known = methods()
    if name not in known:
        raise ConfigError(f"unknown adapter method {name!r}{suggestion(str(name), list(known))}")
    return known[name]


def method_of(config: PeftConfig) -> Method:
    """The method that a configuration object belongs to."""
    return method_named(config.peft_type)


def method_table() -> str:
    """A Markdown table of the registered methods; the README's is this one."""
    lines = ["| method | configuration | adapts | lines | what |", "|---|---|---|---|---|"]
    for method in methods().values():
        module = importlib.import_module(method.adapter.__module__)
        source = inspect.getsource(module).splitlines()
        what = (module.__doc__ or "").strip().splitlines()[0]
        kinds = ", ".join(sorted(method.adapter.layer_kinds))
        lines.append(f"| {method.name} | `{method.config.__name__}` | {kinds} | {len(source)} | {what} |")
    return "\n".join(lines) + "\n"
