"""Putting what was combined into a model as an ordinary LoRA: frozen, not active, and saved as any other.

Its scaling is 1 (lora_alpha = r, at every layer), so that ΔW = BA is all in the factors.
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
from peftcore.merging.factors import padded
from peftcore.merging.layer import Combined
from peftcore.merging.sources import Sources
from peftcore.methods.lora import Lora, LoraConfig


def place(model: nn.Module, name: str, sources: Sources, layers: Mapping[str, Combined]) -> dict[str, int]:
    """Add the LoRA that holds what was combined at each layer; gives its ranks by path.

    Raises MergeError or ConfigError where one LoRA cannot hold it all; the model is then as it was.
    """
    config = _config(model, sources, layers)
    injection = prepare_injection(model, config, name)
    _fill(injection, layers)
    sources.companions.take_to(injection)
    commit_injection(model, injection, trainable=False)
    return {path: cast(Lora, injection.adapters[path]).r for path in layers}


@torch.no_grad()
def _fill(injection: Injection, layers: Mapping[str, Combined]) -> None:
    if missing := sorted(layers.keys() - injection.adapters.keys()):
        raise MergeError(
            f"{missing[0]} is changed by one adapter and trained whole (modules_to_save) by another, and no adapter "
            "can do both; leave one of them out"
        )
    for path, (factors, bias, *_) in layers.items():
        adapter = cast(Lora, injection.adapters[path])
        a, b, scaling = padded(factors, adapter.r)
        adapter.lora_A.copy_(a.reshape(adapter.lora_A.shape))
        adapter.lora_B.copy_(b.permute(1, 2, 0).reshape(adapter.lora_B.shape) * (scaling / adapter.scaling))
        if bias is not None:
            adapter.get_parameter("lora_bias").copy_(bias / adapter.scaling)


def _config(model: nn.Module, sources: Sources, layers: Mapping[str, Combined]) -> LoraConfig:
    bases = {path: sources.set.layers[path].base for path in layers}
    owners = {path: _owner(path, base) for path, base in bases.items()}
    ranks: dict[str, int] = {}
    for path, own in layers.items():
        ranks[owners[path]] = max(1, own.factors.rank, ranks.get(owners[path], 0))
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {key: ranks[path] for path, key in _pattern_keys(ranks).items() if ranks[path] != usual}
    raw = [path for path, base in bases.items() if owners[path] == path and base.kind == "parameter"]
    wanted = {owner for path, owner in owners.items() if path not in raw}
    first, replication = sources.config(sources.names[0]), sources.set.replication
    return LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=True,
        target_modules=_names_of(wanted, ModuleIndex(model).modules) if wanted else None,
        target_parameters=raw or None,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0 if raw else getattr(first, "lora_dropout", 0.0),
        lora_bias=_has_bias(bases, layers),
        fan_in_fan_out=getattr(first, "fan_in_fan_out", False),
        layer_replication=replication and sources.config(replication[0]).layer_replication,
        **sources.companions.options(),
    )


def _owner(path: str, base: BaseWeight) -> str:
    """The path that a configuration names: of nn.MultiheadAttention the module, of other raw parameters their own."""
    inside = isinstance(base, ParameterWeight) and raw_projections(base.layer)
    return path.removesuffix(f".{base.name}") if inside else path  # type: ignore[attr-defined]


def _has_bias(bases: Mapping[str, BaseWeight], layers: Mapping[str, Combined]) -> bool:
    changed = [path for path, own in layers.items() if own.bias is not None]
    if changed and (without := [path for path, base in bases.items() if base.kind in ("embedding", "parameter")]):
        raise MergeError(
            f"the bias of {changed[0]} changes, and a LoRA with biases (lora_bias) does not fit {without[0]}; combine "
            "adapters that leave biases or that layer alone"
        )
    return bool(changed)


def _names_of(wanted: Collection[str], paths: Collection[str]) -> Any:
    """The shortest `target_modules` that means the wanted paths and no other."""
    last = {path.rpartition(".")[2] for path in wanted}
    for names in (last, set(wanted)):
        if sum(named(path, names) for path in paths) == len(wanted):
            return names
    return "|".join(sorted(map(re.escape, wanted)))


def _pattern_keys(paths: Collection[str]) -> dict[str, str]:
    """{path: its key in a pattern}: itself, or a regular expression where it ends another."""
    own = set(paths)
    ambiguous = any(named(path.partition(".")[2], own) for path in paths)
    return {path: f"^{re.escape(path)}" if ambiguous else path for path in paths}
