"""Adapters that were saved before transformers renamed modules of the model, or before it fused the experts' layers.

Before transformers 5 each expert was a module with its own layers, such as `experts.3.w1`. Now the layers of all
experts are one parameter, and two layers of an expert may be one matrix: `experts.gate_up_proj` (e, o, i). The LoRAs of
these layers become one LoRA of that parameter, of rank n·r for n layers: A is stacked, and B is block-diagonal.

Shapes: e experts, i in_features, o out_features, r rank.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.bases import ParameterWeight
from peftcore.config import PeftConfig, TunerConfig, first_match
from peftcore.errors import CheckpointError
from peftcore.files.tensors import PREFIX
from peftcore.injection.former_experts import ModelChanges, can_be_adapted, fused_rank, model_changes, pattern_key
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped
from peftcore.storage.adapter_state import AdapterState

_TOKENS = "token_adapter."
"""First part of the keys of single embedding rows, after the embedding's path."""
# -- keys of renamed modules -----------------------------------------------------------------------------------------


def under_new_names(tensors: Mapping[str, Tensor], expected: Collection[str], model: Any) -> Mapping[str, Tensor]:
    """Return a directory's tensors under the present names of modules that transformers has renamed since.

    Args:
        tensors: The tensors by key.
        expected: The adapter's keys. Only a key that is not among them is renamed, and only to one of them.
        model: The model; models that are not of transformers have no renamed modules.
    """
    foreign = tensors.keys() - expected
    changes = model_changes(model) if foreign else None
    if changes is None:
        return tensors
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in foreign:
            new = changes.renamed(key)
            key = new if new in expected and new not in tensors else key
        renamed[key] = tensor
    return renamed


# -- the configuration -----------------------------------------------------------------------------------------------


def for_present_modules(config: PeftConfig, keys: Iterable[str], model: nn.Module) -> PeftConfig:
    """Return a saved adapter's configuration with the present names of the modules that it adapts.

    Args:
        config: The saved configuration.
        keys: The keys of the saved tensors; they name the modules, as older versions of transformers did.
        model: The model, with or without adapters.

    Returns:
        The configuration; unchanged if no module of the adapter was renamed or fused.

    Raises:
        CheckpointError: Layers that are one parameter now have different scalings.
    """
    changes = model_changes(model) if isinstance(config, TunerConfig) else None
    if changes is None:
        return config
    modules, new_of, fused = ModuleIndex(model).modules, {}, {}
    is_older = False
    for key in keys:
        old, old_rest = _module_of(key, modules)
        new, new_rest = _module_of(changes.renamed(key), modules)
        former = _former_layer(changes.renamed(key))
        if former is not None and (place := changes.fused(former)) is not None:
            fused.setdefault(place[0], {})[place[1]] = _former_layer(key)
            is_older = True
        elif len(new_rest) < len(old_rest):
            is_older = True
            new_of[new] = ".".join([part for part in (old, *old_rest[: len(old_rest) - len(new_rest)]) if part])
        elif new and not _is_own(modules[new], new_rest) and not new_rest[0].startswith(_TOKENS.rstrip(".")):
            new_of[new] = new
    return _with_targets(config, modules, new_of, fused) if is_older else config


def _module_of(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, list[str]]:
    """Return (path of the deepest module on the way to a tensor, the rest of the key in parts)."""
    path, rest = key.removeprefix(PREFIX), []
    while path and path not in modules:
        path, _, part = path.rpartition(".")
        rest.insert(0, part)
    return path, rest


def _former_layer(key: str) -> str | None:
    """Return the path of the layer of a LoRA's tensor; None for other tensors."""
    match = re.fullmatch(r"(.*)\.lora_[AB]\.weight", key.removeprefix(PREFIX))
    return None if match is None else match[1]


def _is_own(module: nn.Module, rest: list[str]) -> bool:
    """Return True if the rest of a key names a tensor of the module itself, not of an adapter."""
    return rest == [] or (rest[-1] in unwrapped(module)._parameters and len(rest) == 1)


def _with_targets(
    config: Any,
    modules: Mapping[str, nn.Module],
    new_of: Mapping[str, str],
    fused: Mapping[str, Mapping[int, str]],
) -> PeftConfig:
    """Return the configuration with full paths as its targets, and with the ranks and scalings of the old paths."""
    layers = [path for path in new_of if can_be_adapted(modules[path])]
    parameters = {f"{path}.weight": path for path in new_of if path not in layers}
    values: dict[str, Any] = {"target_modules": _exactly(layers, modules), "exclude_modules": None}
    values |= {"layers_to_transform": None, "layers_pattern": None}
    for field in dataclasses.fields(config):
        pattern = getattr(config, field.name)
        if field.name.endswith("_pattern") and isinstance(pattern, dict):
            by_path = {**{path: new_of[path] for path in layers}, **{p: new_of[m] for p, m in parameters.items()}}
            matches = {path: first_match(pattern, old, None) for path, old in by_path.items()}
            values[field.name] = {pattern_key(path): value for path, value in matches.items() if value is not None}
    for path, sources in fused.items():
        rank, scalings = fused_rank(config, sources.values())
        if len(scalings) > 1:
            raise CheckpointError(
                f"{path} is one parameter now, and the adapter has different scalings for its parts "
                f"{sorted(sources.values())}; merge the adapter with the version of transformers that trained it"
            )
        values["rank_pattern"][pattern_key(path)] = rank
        values["alpha_pattern"][pattern_key(path)] = scalings.pop() * config.denominator(rank)
    if fused or parameters:
        values["target_parameters"] = [*(config.target_parameters or ()), *parameters, *fused]
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} is dropped: the experts' layers are parameters now, whose input "
                "is not seen",
                stacklevel=6,
            )
            values["lora_dropout"] = 0.0
    return dataclasses.replace(config, **values)


def _exactly(paths: list[str], modules: Iterable[str]) -> list[str] | str:
    """Return `target_modules` that match these paths only."""
    chosen = set(paths)
    if any(other.endswith(f".{path}") for path in paths for other in modules if other not in chosen):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)


def with_fused_experts(tensors: Mapping[str, Tensor], state: AdapterState, model: Any) -> Mapping[str, Tensor]:
    """Return a directory's tensors with one LoRA per parameter in place of the LoRAs of the experts' former layers.

    Args:
        tensors: The tensors by key.
        state: The adapter that is loaded.
        model: The model.
    """
    targets = {
        adapter.printed[1]: (prefix, adapter, list(own))
        for prefix, adapter, own in state.entries
        if isinstance(adapter.base, ParameterWeight) and not any(f"{prefix}{key}" in tensors for key in own)
    }
    changes = model_changes(model) if targets else None
    if changes is None or not changes.fusions:
        return tensors
    result = dict(tensors)
    for path, layers in _former_layers(tensors, changes, targets).items():
        prefix, adapter, (key_a, key_b, *_) = targets[path]
        count = len(next(fusion for fusion in changes.fusions if path.endswith(fusion.target)).sources)
        factors = _factors_by_expert(tensors, layers, adapter.base.count)
        if factors is None:
            continue  # some experts have no LoRA: the missing keys are reported
        rows = adapter.base.out_features // count
        result[f"{prefix}{key_a}"] = torch.cat([a for expert in factors for a, _, _ in expert])
        b = torch.stack([_block_diagonal(expert, rows, count) for expert in factors], 2)
        result[f"{prefix}{key_b}"] = b.flatten(1)
        for layer in layers.values():
            for key in _lora_keys(layer):
                del result[key]
    return result


def _former_layers(
    keys: Iterable[str], changes: ModelChanges, parameters: Collection[str]
) -> dict[str, dict[tuple[int, int], str]]:
    """Return {parameter: {(index of the source, expert): path of the former layer in the keys}}."""
    layers: dict[str, dict[tuple[int, int], str]] = {}
    for key in keys:
        former = _former_layer(changes.renamed(key))
        fused = None if former is None else changes.fused(former)
        if fused is not None and fused[0] in parameters:
            parameter, source, expert = fused
            saved = _former_layer(key)
            assert saved is not None
            layers.setdefault(parameter, {})[source, expert] = saved
    return layers


def _factors_by_expert(
    tensors: Mapping[str, Tensor], layers: Mapping[tuple[int, int], str], experts: int
) -> list[list[tuple[Tensor, Tensor, int]]] | None:
    """Return (A, B, index of the source) of each source, for each expert; None if some expert lacks one of them."""
    sources = sorted({source for source, _ in layers})
    if layers.keys() != {(source, expert) for source in sources for expert in range(experts)}:
        return None
    if not all(key in tensors for layer in layers.values() for key in _lora_keys(layer)):
        return None
    keys = {place: _lora_keys(layer) for place, layer in layers.items()}
    return [
        [(tensors[keys[source, expert][0]], tensors[keys[source, expert][1]], source) for source in sources]
        for expert in range(experts)
    ]


def _lora_keys(layer: str) -> tuple[str, str]:
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def _block_diagonal(factors: list[tuple[Tensor, Tensor, int]], rows: int, count: int) -> Tensor:
    """Return B (count·rows, sum of the ranks) of one expert; B of each source changes the rows of its source only."""
    ranks = [b.shape[1] for _, b, _ in factors]
    result = factors[0][1].new_zeros(count * rows, sum(ranks))
    column = 0
    for (_, b, source), rank in zip(factors, ranks, strict=True):
        result[source * rows : (source + 1) * rows, column : column + rank] = b
        column += rank
    return result
