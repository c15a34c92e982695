"""Initialisation from data: `initialize_from_data(model, batches)`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from peftcore.errors import ConfigError
from peftcore.injection import inject
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.observation import observe
from peftcore.injection.original_weights import OriginalWeights, Source
from peftcore.kernels.maths import weight_shape
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.observer import Observer


def initialize_from_data(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    progress: bool = True,
    model_path: Source = None,
) -> None:
    """Initialise an adapter whose initialisation needs data, in place: "eva", "corda", "lora_ga", "qera" or "cloq".

    "eva" may change the ranks of layers, and remove the adapter of layers that get no rank. "qera" and "cloq" need a
    quantised base, and take 4·i² bytes for each layer of i inputs meanwhile. Where that would exceed 2 GiB, they
    observe the layers in groups, with one pass over the batches for each group.

    Args:
        model: The model with the adapter.
        batches: Keyword arguments of the model, as tensors on its device. A few hundred rows of training data are
            enough. "lora_ga" needs labels, so that the model returns a loss.
        adapter_name: The adapter to initialise.
        forward: Function to call as `forward(model, batch)` instead of `model(**batch)`.
        progress: Show a progress bar.
        model_path: Of "qera" and "cloq", the weights from before the base was quantised: a directory of safetensors,
            one such file, or {parameter path: tensor}; None for the directory, or the hub's cache, from which the model
            was loaded.

    Raises:
        ConfigError: The initialisation needs no data, or the data or the base do not fit it. The adapter is then
            unchanged.
        CheckpointError: An original weight is missing. The adapter is then unchanged.
    """
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    config = adapters.configs[adapter_name]
    if not config.needs_data:
        raise ConfigError(
            f"adapter {adapter_name!r} needs no data for its initialisation; use init_lora_weights='eva', 'corda', "
            "'lora_ga', 'qera' or 'cloq', or leave this call out"
        )
    config = cast(LoraConfig, config)
    layers = cast(dict[str, Lora], adapters.of_method(adapter_name))
    if others := [path for path, adapter in layers.items() if adapter.base.kind != "linear"]:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} fits linear layers only; exclude {others[0]}"
        )
    observer = config.observer(layers)
    groups = observer.groups()
    if observer.needs_original:
        shapes = {path: weight_shape(layers[path].base) for paths in groups for path in paths}
        observer.original = OriginalWeights(model, model_path, shapes).read
    elif model_path is not None:
        raise ConfigError(
            f"model_path has no effect with init_lora_weights={config.init_lora_weights!r}, which reads no original "
            "weights; leave it out"
        )
    bases = {path: adapter.base.layer for path, adapter in layers.items()}
    again = batches if len(groups) == 1 else list(batches)
    for paths in groups:
        observe(model, observer, {path: bases[path] for path in paths}, again, forward, progress)
        observer.finish(paths)
    observer.check()
    apply_start(model, adapter_name, config, observer, progress)


@torch.no_grad()
def apply_start(model: nn.Module, name: str, config: LoraConfig, observer: Observer, progress: bool = True) -> None:
    """Give an adapter the ranks and the factors of an observer.

    Args:
        model: The model with the adapter.
        name: The adapter.
        config: Its configuration.
        observer: An observer that has seen the data.
        progress: Show a progress bar.
    """
    ranks = observer.ranks()
    # of get_peft_model(low_cpu_mem_usage=True)
    has_no_values = any(parameter.is_meta for parameter in adapter_set(model).parameters(name))
    if has_no_values or any(rank != observer.layers[path].r for path, rank in ranks.items()):
        _replace_adapter(model, name, config.with_ranks(ranks, observer.keeps_alpha))
    layers = cast(dict[str, Lora], adapter_set(model).of_method(name))
    for path, adapter in tqdm(layers.items(), desc=observer.title, unit="layer", disable=not progress):
        adapter.set_factors(*observer.factors(path, adapter))
        if observer.needs_original:
            adapter.reset_variants()  # DoRA's lengths are those of the corrected weight
        if config.initialisation().subtracts:
            adapter.subtract_start()
    inject.change_base_if_asked(adapter_set(model), name)


def _replace_adapter(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Replace an adapter by a new one with another configuration."""
    adapters = adapter_set(model)
    active = adapters.selection.active
    trainable = any(p.requires_grad for p in adapters.parameters(name))
    inject.delete_adapter(model, name)
    inject.commit_injection(model, inject.prepare_injection(model, config, name), trainable)
    adapters.selection.active = active
