"""`peft.tuners.tuners_utils`: the classes of layers with adapters, and functions on models with such layers."""

from torch import nn

from peftcore.config import TunerConfig
from peftcore.errors import TargetError
from peftcore.hf_peft.classes import BaseTunerLayer
from peftcore.hf_peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peftcore.injection.targets import matches_targets
from peftcore.injection.tuner_model import TunerModel as BaseTuner
from peftcore.layers.wrapper import original_modules

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_target_module_exists",
    "delete_adapter",
    "inspect_matched_modules",
    "set_adapter",
    "set_requires_grad",
]


def check_target_module_exists(config: TunerConfig, key: str) -> bool:
    """Return True if the configuration's `target_modules` and the options beside it select a path.

    Args:
        config: a configuration.
        key: the path of a module, such as "model.layers.0.self_attn.q_proj".
    """
    return matches_targets(config, key)


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return which modules an adapter's `target_modules` select.

    Args:
        tuner: `model.base_model`.
        adapter_name: the adapter.

    Returns:
        {"matched": paths of the adapted layers, "unmatched": paths of all other modules}

    Raises:
        AdapterNameError: the adapter is not loaded.
        TargetError: the adapter is a prompt, which has no targets.
    """
    config = tuner.peft_config.get(adapter_name)
    if not isinstance(config, TunerConfig):
        raise TargetError(f"inspect_matched_modules: {adapter_name!r} is not an adapter of layers in this model")
    paths: dict[str, list[str]] = {"matched": [], "unmatched": []}
    model: nn.Module = tuner.model
    for path, _ in original_modules(model):
        paths["matched" if matches_targets(config, path) else "unmatched"].append(path)
    return paths
