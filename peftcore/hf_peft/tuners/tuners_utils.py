"""`peft.tuners.tuners_utils`: the classes of layers with adapters, and functions on models with such layers."""

import contextlib
import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftcore.bases import base_weight, is_adaptable
from peftcore.bases.offload import offload_hook, replace_offloaded
from peftcore.config import TunerConfig
from peftcore.errors import OptionTypeError, TargetError
from peftcore.files.tensors import PREFIX
from peftcore.hf_peft.classes import BaseTunerLayer
from peftcore.hf_peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import _get_submodules
from peftcore.hf_peft.utils.constants import (
    DUMMY_MODEL_CONFIG,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
)
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.replication import replicate
from peftcore.injection.targets import ALL_LINEAR, is_within, matches_targets, shortest_names, target_paths
from peftcore.injection.tuner_model import TunerModel as BaseTuner
from peftcore.layers.trained_bias import TrainedBias
from peftcore.layers.wrapper import original_modules
from peftcore.storage.adapter_state import SHARED_PREFIX, adapter_state_of
from peftcore.storage.state_dict import has_prefix

__all__ = [
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "BaseTuner",
    "BaseTunerLayer",
    "_find_minimal_target_modules",
    "_get_in_out_features",
    "_get_submodules",
    "_maybe_include_all_linear_layers",
    "_remove_adapter_name_from_state_dict_key",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "onload_layer",
    "replicate_layers",
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


def check_adapters_to_merge(module: Any, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Return the adapters of a layer that are not merged yet, with a warning if some are.

    Args:
        module: a layer with adapters.
        adapter_names: the adapters to merge; None for the active ones.

    Raises:
        OptionTypeError: one name was given in place of a list.
    """
    if isinstance(adapter_names, str):
        raise OptionTypeError(f"adapter_names must be a list of names; got {adapter_names!r}; try [{adapter_names!r}]")
    merged = list(module.merged_adapters)
    names = [name for name in adapter_names or module.active_adapters if name not in merged]
    if merged and names:
        warnings.warn(
            f"Already following adapters were merged: {', '.join(merged)}. Now merged as well: {', '.join(names)}",
            stacklevel=2,
        )
    elif merged:
        warnings.warn("All adapters are already merged", stacklevel=2)
    return names


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Have the weights of a layer that accelerate has offloaded in its parameters; changes of them are kept.

    Does nothing for other layers.

    Args:
        layer: a layer with adapters, or a plain one.
    """
    base: nn.Module = getattr(layer, "base_layer", layer)
    hook = offload_hook(base)
    if hook is None:
        yield
        return
    hook.pre_forward(base)
    try:
        yield
    finally:
        for name, parameter in base.named_parameters(recurse=False):
            replace_offloaded(base, hook, name, parameter)
        hook.post_forward(base, torch.empty(0))


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


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """Return the shortest names that match some modules of a model and no others.

    Args:
        target_modules: paths of the modules to match.
        other_module_names: paths that no name may match.

    Raises:
        TargetError: no path is given, one is empty, or a path is in both collections.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise TargetError(f"target_modules must be paths of modules, at least one; got {target_modules!r:.200}")
    if "" in target_modules:
        raise TargetError("target_modules holds the model's own path '', which has no name; leave it out")
    if both := set(target_modules) & set(other_module_names):
        raise TargetError(f"{sorted(both)[:5]} are in target_modules and in other_module_names; leave them out of one")
    return shortest_names(target_modules, other_module_names)


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Return the configuration with the paths of the linear layers in place of `target_modules="all-linear"`.

    Args:
        peft_config: a configuration; returned itself if it has other targets, or none.
        model: the model, with or without adapters.
    """
    if not isinstance(peft_config, TunerConfig) or peft_config.target_modules != ALL_LINEAR:
        return peft_config
    return dataclasses.replace(peft_config, target_modules=set(target_paths(ModuleIndex(model), peft_config)))


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Return how HF PEFT's names of the parameters of adapters begin, such as "base_model.model.q_proj.lora_A".

    Modules that train whole (`modules_to_save`) and rows of embeddings (`trainable_token_indices`) are left out.

    Args:
        model: a model with adapters. Without a `PeftModel`'s class, no name begins with `base_model.model`.
        adapter_name: the only adapter whose names are returned, with the adapter's name at their end; None for all.

    Raises:
        AdapterNameError: the adapter is not loaded.
    """
    adapters = adapter_set(model)
    if adapter_name is not None:
        adapters.require(adapter_name)
    end = "" if adapter_name is None else f".{adapter_name}"
    prefixes: set[str] = set()
    for name in adapters.configs if adapter_name is None else (adapter_name,):
        state = adapter_state_of(adapters, name)
        for prefix, adapter, tensors in state.entries:
            if not isinstance(adapter, TrainedBias) and not adapter.disk_prefix:
                prefixes.update(f"{prefix}{key.partition('.')[0]}{end}" for key in tensors)
        if state.shared is not None:
            prefixes.update(f"{SHARED_PREFIX}{key}{end}" for key in state.shared.checkpoint_tensors())
    return prefixes if has_prefix(model) else {prefix.removeprefix(PREFIX) for prefix in prefixes}


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """Return the entries of a state dict whose key is a prefix, or goes on after a prefix with a dot.

    Args:
        state_dict: {key: value}.
        prefixes: beginnings of keys, in whole segments.
    """
    prefixes = frozenset(prefixes)
    return {key: value for key, value in state_dict.items() if is_within(key, prefixes)}


def _get_in_out_features(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """Return the sizes (inputs, outputs) of a layer; (None, None) for a layer that has no such sizes.

    Args:
        module: a layer: linear, also quantised, a convolution, an embedding, or an attention with joined projections.
    """
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if not is_adaptable(module):
        return None, None
    base = base_weight(module, type(module).__name__)
    return (base.in_features, base.out_features) if base.kind in ("linear", "conv", "embedding") else (None, None)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Return the path of a module in a model; "" if it is not there."""
    return next((path for path, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Return {path: device} of a model that is divided among devices, {"": device} for one on a single device."""
    device_map: Any = getattr(model, "hf_device_map", None)
    return {"": next(model.parameters()).device} if device_map is None else device_map


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> None:
    """Replace the model's blocks, in place, by those of several ranges; repeated blocks share their weights.

    Args:
        model: a plain model with one list of blocks.
        layer_map: (first block, last block + 1) of each range, in order.

    Raises:
        ConfigError: a range is empty or outside of the model.
        TargetError: the model does not have exactly one list of blocks.
    """
    replicate(model, layer_map)


def _remove_adapter_name_from_state_dict_key(key: str, adapter_name: str) -> str:
    """Return the key of an adapter's tensor in a file, such as "q.lora_A.weight", for "q.lora_A.default.weight"."""
    path, dot, last = key.rpartition(".")
    if dot and last == adapter_name:
        return path
    return f"{path.removesuffix(f'.{adapter_name}')}{dot}{last}"


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
