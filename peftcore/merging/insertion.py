"""Insertion of merged layers into a model as an ordinary LoRA: frozen, not active, and saved like any other.

The LoRA's scaling is 1 (lora_alpha = r at every layer), so that the factors alone hold ΔW = BA.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from peftcore.bases import BaseWeight, ParameterWeight, raw_projections
from peftcore.errors import MergeError
from peftcore.injection.inject import commit_injection
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import Injection, prepare_injection
from peftcore.injection.targets import named
from peftcore.kernels.factors import padded
from peftcore.merging.layer import MergedLayer
from peftcore.merging.sources import Sources
from peftcore.methods.lora import Lora, LoraConfig


def insert_lora(model: nn.Module, name: str, sources: Sources, layers: Mapping[str, MergedLayer]) -> dict[str, int]:
    """Add a LoRA with the merged layers to the model, and return its ranks by path.

    Raises:
        ConfigError, MergeError: one LoRA cannot hold all layers; the model is unchanged.
    """
    injection = prepare_injection(model, _config(model, sources, layers), name)
    _fill(injection, layers)
    sources.extra_modules.copy_to(injection)
    commit_injection(model, injection, trainable=False)
    return {path: cast(Lora, injection.adapters[path]).r for path in layers}


@torch.no_grad()
def _fill(injection: Injection, layers: Mapping[str, MergedLayer]) -> None:
    if missing := sorted(layers.keys() - injection.adapters.keys()):
        raise MergeError(
            f"{missing[0]} is changed by one adapter and trained in full (modules_to_save) by another, and no adapter "
            "can do both; leave one of them out"
        )
    for path, (factors, bias, *_) in layers.items():
        adapter = cast(Lora, injection.adapters[path])
        a, b, scaling = padded(factors, adapter.r)
        adapter.lora_A_weight.copy_(a.reshape(adapter.lora_A_weight.shape))
        adapter.lora_B_weight.copy_(
            b.permute(1, 2, 0).reshape(adapter.lora_B_weight.shape) * (scaling / adapter.scaling)
        )
        if bias is not None:
            adapter.get_parameter("lora_bias").copy_(bias / adapter.scaling)


def _config(model: nn.Module, sources: Sources, layers: Mapping[str, MergedLayer]) -> LoraConfig:
    bases = {path: sources.set.layers[path].base for path in layers}
    target_paths = {path: _target_path(path, base) for path, base in bases.items()}
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        ranks[target_paths[path]] = max(1, layer.factors.rank, ranks.get(target_paths[path], 0))
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {key: ranks[path] for path, key in _pattern_keys(ranks).items() if ranks[path] != usual}
    parameters = [path for path, base in bases.items() if target_paths[path] == path and base.kind == "parameter"]
    targets = {target for path, target in target_paths.items() if path not in parameters}
    first, replication = sources.config(sources.names[0]), sources.set.replication
    return LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
        target_modules=target_modules(targets, ModuleIndex(model).modules) if targets else None,
        target_parameters=parameters or None,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0 if parameters else getattr(first, "lora_dropout", 0.0),
        lora_bias=_has_bias(bases, layers),
        fan_in_fan_out=getattr(first, "fan_in_fan_out", False),
        layer_replication=replication and sources.config(replication[0]).layer_replication,
        **sources.extra_modules.options(),
    )


def _target_path(path: str, base: BaseWeight) -> str:
    """Return the path that a configuration targets: the module for nn.MultiheadAttention's raw projections."""
    is_projection = isinstance(base, ParameterWeight) and raw_projections(base.layer)
    return path.removesuffix(f".{base.name}") if is_projection else path  # type: ignore[attr-defined]


def _has_bias(bases: Mapping[str, BaseWeight], layers: Mapping[str, MergedLayer]) -> bool:
    changed = [path for path, layer in layers.items() if layer.bias is not None]
    if changed and (without := [path for path, base in bases.items() if base.kind in ("embedding", "parameter")]):
        raise MergeError(
            f"the bias of {changed[0]} changes, and a LoRA with biases (lora_bias) cannot target {without[0]}; merge "
            "adapters that do not change biases, or leave that layer out"
        )
    return bool(changed)


def target_modules(targets: Collection[str], paths: Collection[str]) -> Any:
    """Return the shortest `target_modules` that matches the targets and no other path."""
    last_parts = {path.rpartition(".")[2] for path in targets}
    for names in (last_parts, set(targets)):
        if sum(named(path, names) for path in paths) == len(targets):
            return names
    return "|".join(sorted(map(re.escape, targets)))


def _pattern_keys(paths: Collection[str]) -> dict[str, str]:
    """Return {path: its key in a pattern}: regular expressions if one path ends with another, else the paths."""
    own = set(paths)
    ambiguous = any(named(path.partition(".")[2], own) for path in paths)
    return {path: f"^{re.escape(path)}" if ambiguous else path for path in paths}
