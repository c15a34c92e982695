"""Import finders: other names for this package's modules, and one module per method below `tuners`.

`peftcore.tuners` is another name of `peftcore.hf_peft.tuners`; after `import peftcore.as_peft`, so is `peft.tuners`. An
alias is the same module object, so a class is the same class under every name.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "peftcore.hf_peft"
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
_PARTS = ("bnb", "config", "layer", "model", "utils")
"""Submodules of methods in HF PEFT."""
_OTHER_PLACES = {
    **dict.fromkeys((f"optimizers.{name}" for name in ("lorafa", "loraplus", "riemannian")), "optimizers"),
    **dict.fromkeys(
        (f"tuners.lora.{name}" for name in (*_PARTS, "awq", "conversion", "eva", "gptq", "hqq", "tp_layer")),
        "tuners.lora",
    ),
    "tuners.adalora.gptq": "tuners.adalora",
    "tuners.adamss.asa_callback": "tuners.asa_callback",
    "tuners.mixed.model": "tuners.mixed",
    "tuners.osf.utils": "tuners.osf_utils",
    "tuners.shira.mask_functions": "tuners.shira_masks",
}
"""{module of HF PEFT: the module here that has its names}"""

_MORE_NAMES = {
    "ADALORA": {"RankAllocator": "peftcore.injection.rank_allocator"},
    "LOKR": {"factorization": "peftcore.methods.lokr"},
    "MULTITASK_PROMPT_TUNING": {"MultitaskPromptEmbedding": "peftcore.hf_peft.classes"},
}
"""{method: {further class or function of HF PEFT's module that scripts import: its module here}}"""


class _AliasLoader:
    """Loader that returns a module which has another name, too."""

    def __init__(self, target: str):
        self._target = target
        self._own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._target)
        self._own_spec = module.__spec__  # the import system now writes the alias's spec into the module
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec


def _loader(loader: Any) -> Any:
    """Return a loader; `importlib.abc`, which has the type, imports too much."""
    return loader


def _spec_of(name: str) -> ModuleSpec | None:
    from importlib.util import find_spec  # here, because it imports much

    return find_spec(name)


class AliasFinder:
    """Finder of a module tree under another name.

    Args:
        alias: the other name, such as "peft".
        target: the name of the tree, such as "peftcore.hf_peft".
    """

    def __init__(self, alias: str, target: str):
        self.alias, self.target = alias, target

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Return the spec of an alias; None for every other module."""
        if fullname != self.alias and not fullname.startswith(f"{self.alias}."):
            return None
        real = self.target + fullname[len(self.alias) :]
        spec = _spec_of(real)
        if spec is None:
            return None
        is_package = spec.submodule_search_locations is not None
        return ModuleSpec(fullname, _loader(_AliasLoader(real)), origin=spec.origin, is_package=is_package)


class _MethodLoader:
    """Loader of the module of a method: its configuration, model and layer classes."""

    def __init__(self, method: str):
        self._method = method

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        import peftcore
        from peftcore.hf_peft.classes import layer_class, layer_classes
        from peftcore.registry import method_named

        method = method_named(self._method)
        stem = method.config.__name__.removesuffix("Config")
        module.__doc__ = f"Classes of {method.name} under HF PEFT's names."
        layer = layer_class(f"{stem}Layer", method.name)
        vars(module).update({method.config.__name__: method.config, layer.__name__: layer})
        vars(module).update(layer_classes(method.name))
        for name, source in _MORE_NAMES.get(self._method, {}).items():
            vars(module)[name] = getattr(importlib.import_module(source), name)
        vars(module)["__getattr__"] = lambda name: _from_root(peftcore, module, name)


def _from_root(root: ModuleType, module: ModuleType, name: str) -> Any:
    from peftcore.hf_peft.default_targets import is_table, table

    if is_table(name):
        return table(name, module.__name__)
    if "__path__" in vars(module) and name in _PARTS:
        return submodule(module.__name__, name)
    if not name.startswith("__") and hasattr(root, name):
        return getattr(root, name)
    from peftcore.hf_peft.reexports import reexported  # here, because its modules are imported through this finder

    return reexported(module.__name__, name)


def submodule(package: str, name: str) -> ModuleType:
    """Return the submodule `name` of a package for an access such as `peft.tuners.lora`; HF PEFT imports all of them.

    Raises:
        AttributeError: the package has no such submodule.
    """
    if not is_submodule(package, name):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


def is_submodule(package: str, name: str) -> bool:
    """Return True if a package has the submodule `name`."""
    return not name.startswith("__") and _spec_of(f"{package}.{name}") is not None


class MethodFinder:
    """Finder of `peftcore.hf_peft.tuners.METHOD`, of its submodules in `_PARTS`, and of `_OTHER_PLACES`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Return the spec of one of these modules; None for every other module."""
        start = f"{PACKAGE}.tuners."
        if place := _OTHER_PLACES.get(fullname.removeprefix(f"{PACKAGE}.")):
            return ModuleSpec(fullname, _loader(_AliasLoader(f"{PACKAGE}.{place}")))
        if not fullname.startswith(start):
            return None
        method, *parts = fullname[len(start) :].split(".")
        if parts and (len(parts) > 1 or parts[0] not in _PARTS):
            return None
        from peftcore.registry import methods

        if method == "lora" or method.upper() not in methods():
            return None
        return ModuleSpec(fullname, _loader(_MethodLoader(method.upper())), is_package=not parts)


def install_in_peftcore() -> None:
    """Make `peftcore.tuners`, `peftcore.utils` and the other `SUBMODULES` importable."""
    install(MethodFinder(), *(AliasFinder(f"peftcore.{name}", f"{PACKAGE}.{name}") for name in SUBMODULES))


def install(*finders: Any) -> None:
    """Put finders in front of the import system's own, except those that are there already."""
    for finder in finders:
        if not any(vars(finder) == vars(one) and type(finder) is type(one) for one in sys.meta_path):
            sys.meta_path.insert(0, finder)
