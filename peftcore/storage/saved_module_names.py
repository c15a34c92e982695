"""Names in `modules_to_save` that match more modules in HF PEFT, because they are the end of a module's name.

In HF PEFT, "norm" also matches `input_layernorm`. In peftcore, a name matches whole path segments. So the names of a
configuration from HF PEFT may match fewer modules than its directory holds, and a configuration that HF PEFT is to read
needs longer names.
"""

import dataclasses
from collections.abc import Collection

from torch import nn

from peftcore.config import PeftConfig, PromptLearningConfig, TunerConfig
from peftcore.files.tensors import PREFIX
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import named
from peftcore.layers.wrapper import unwrapped


def with_saved_module_names(config: PeftConfig, keys: Collection[str], model: nn.Module) -> PeftConfig:
    """Return a saved adapter's configuration with the paths of all modules that the adapter trains in full.

    Args:
        config: The saved configuration.
        keys: The keys of the saved tensors.
        model: The model, with or without adapters.

    Returns:
        The configuration; unchanged if its names match every module with tensors in the directory.
    """
    names = _names(config)
    if not names:
        return config
    holders = {key.removeprefix(PREFIX).rpartition(".")[0]: key.rpartition(".")[2] for key in keys}
    missing = [
        path
        for path, module in ModuleIndex(model).modules.items()
        if path.endswith(tuple(names)) and not named(path, names)
        if holders.get(path) in unwrapped(module)._parameters
    ]
    return dataclasses.replace(config, modules_to_save=[*names, *missing]) if missing else config


def with_exact_module_names(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Return an adapter's configuration with names that match the same modules in HF PEFT as here.

    Args:
        config: The adapter's configuration.
        model: The model with the adapter.

    Returns:
        The configuration, with whole paths in place of a name that is also the end of other modules' names.
    """
    names = _names(config)
    if not names:
        return config
    paths = list(ModuleIndex(model).modules)
    exact: list[str] = []
    for name in names:
        trained = [path for path in paths if named(path, [name])]
        matches_others = any(path.endswith(name) and not named(path, names) for path in paths)
        exact += trained if matches_others else [name]
    return config if exact == list(names) else dataclasses.replace(config, modules_to_save=exact)


def _names(config: PeftConfig) -> Collection[str]:
    """Return the names in `modules_to_save`; () for a regular expression or none."""
    names = config.modules_to_save if isinstance(config, TunerConfig | PromptLearningConfig) else None
    return () if not names or isinstance(names, str) else names
