"""Modules that HF PEFT trains in full because a name of `modules_to_save` is the end of their name.

In HF PEFT, "norm" also matches `input_layernorm`. In peftcore, a name matches whole path segments, so the names of a
configuration from HF PEFT may match fewer modules than its directory holds.
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
    names = config.modules_to_save if isinstance(config, TunerConfig | PromptLearningConfig) else None
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
