"""HF PEFT's tables of default targets: `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` and those of other methods.

peftcore finds default targets in a model's structure, without a table. A program may read these tables, and it may set
entries, which then take the place of the defaults.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch

from peftcore.detection import Architecture, detect
from peftcore.detection.defaults import GIVEN_FEEDFORWARD, GIVEN_TARGETS
from peftcore.errors import TargetError
from peftcore.registry import methods

_START, _END = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
_FEEDFORWARD = "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"


class DefaultTargets(MutableMapping[str, Any]):
    """{model type of transformers: names of layers that are a default}.

    An entry that nobody has set is found when it is read, from a model of this type without weights. Entries that were
    neither set nor read are not iterated over.

    Args:
        given: the entries that a program has set, which new adapters read.
        default: returns the names in an architecture.
    """

    def __init__(self, given: dict[str, Any], default: Callable[[Architecture], Iterable[str]]):
        self._given, self._default = given, default
        self._found: dict[str, list[str] | str] = {}

    def __getitem__(self, model_type: str) -> Any:
        if model_type in self._given:
            return self._given[model_type]
        if model_type not in self._found:
            self._found[model_type] = self._names_in(model_type)
        if not self._found[model_type]:
            raise KeyError(model_type)
        return self._found[model_type]

    def __setitem__(self, model_type: str, targets: Any) -> None:
        self._given[model_type] = targets

    def __delitem__(self, model_type: str) -> None:
        del self._given[model_type]

    def __iter__(self) -> Iterator[str]:
        return (model_type for model_type in {**self._given, **self._found} if model_type in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _names_in(self, model_type: str) -> list[str] | str:
        """Return the default of a model of this type; [] if transformers has no such model, or no layers.

        Names with `*`, which are no `target_modules`, become a regular expression of all names.
        """
        from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel  # here, because it imports much

        if model_type not in CONFIG_MAPPING or (config := CONFIG_MAPPING[model_type]) not in MODEL_MAPPING:
            return []
        with torch.device("meta"):
            model = AutoModel.from_config(config())
        try:
            architecture = detect(model)
            names = list(self._default(architecture))
        except TargetError:
            return []
        return architecture.target_regex(names) if any("*" in name for name in names) else names


_TABLES: dict[str, DefaultTargets] = {
    _FEEDFORWARD: DefaultTargets(GIVEN_FEEDFORWARD, lambda architecture: architecture.feedforward_modules)
}
"""{HF PEFT's name: table} of the tables that were read; the one of IA3's `feedforward_modules`."""


def table(name: str, module: str) -> DefaultTargets:
    """Return a table by HF PEFT's name, such as "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING".

    Args:
        name: the table's name.
        module: the name of the module of which it is an attribute.

    Raises:
        AttributeError: the name is not that of a table, or there is no method of this name.
    """
    if name not in _TABLES:
        known = {method.replace("_", ""): method for method in methods()}
        method = known.get(name.removeprefix(_START).removesuffix(_END)) if is_table(name) else None
        if method is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        given = GIVEN_TARGETS.setdefault(method, {})
        _TABLES[name] = DefaultTargets(given, lambda architecture: architecture.targets_for(method))
    return _TABLES[name]


def is_table(name: str) -> bool:
    """Return True if a name is that of a table of default targets, or of IA3's `feedforward_modules`."""
    return name == _FEEDFORWARD or (name.startswith(_START) and name.endswith(_END))
