"""Initialisation from data: `initialize_from_data(model, batches)`."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import ConfigError
from peftcore.injection import activation, inject
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.layers.training_flags import training_flags_restored
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.observer import Observer


def initialize_from_data(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    progress: bool = True,
) -> None:
    """Initialise an adapter whose initialisation needs data ("eva", "corda" or "lora_ga"), in place.

    "eva" may change the ranks of layers, and remove the adapter of layers that get no rank.

    Args:
        model: The model with the adapter.
        batches: Keyword arguments of the model, as tensors on its device. A few hundred rows of training data are
            enough. "lora_ga" needs labels, so that the model returns a loss.
        adapter_name: The adapter to initialise.
        forward: Function to call as `forward(model, batch)` instead of `model(**batch)`.
        progress: Show a progress bar.

    Raises:
        ConfigError: If the initialisation needs no data, or there is no batch. The adapter is then unchanged.
    """
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    config = adapters.configs[adapter_name]
    if not config.needs_data:
        raise ConfigError(
            f"adapter {adapter_name!r} needs no data for its initialisation; use init_lora_weights='eva', 'corda' or "
            "'lora_ga', or leave this call out"
        )
    config = cast(LoraConfig, config)
    layers = cast(dict[str, Lora], adapters.of_method(adapter_name))
    if others := [path for path, adapter in layers.items() if adapter.base.kind != "linear"]:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} fits linear layers only; exclude {others[0]}"
        )
    observer = config.observer(layers)
    observe(model, observer, batches, forward, progress)
    apply_start(model, adapter_name, config, observer)


def observe(
    model: Any,
    observer: Observer,
    batches: Iterable[Mapping[str, Any]],
    forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    progress: bool = True,
) -> None:
    """Let an observer see the layers of the base while it computes batches, until the observer needs no more.

    Args:
        model: The model, with or without adapters.
        observer: The observer.
        batches: Keyword arguments of the model.
        forward: Function to call as `forward(model, batch)` instead of `model(**batch)`.
        progress: Show a progress bar.

    Raises:
        ConfigError: If there is no batch.
    """
    batch_count = 0
    keep_quantized_weights_trainable(model)
    handles = [
        adapter.base.layer.register_forward_hook(observer.hook(path)) for path, adapter in observer.layers.items()
    ]
    try:
        base = activation.adapters_disabled(model) if ATTRIBUTE in vars(model) else contextlib.nullcontext()
        with training_flags_restored(model), base, torch.set_grad_enabled(observer.needs_loss):
            model.eval()
            for batch in tqdm(batches, desc=observer.title, unit="batch", disable=not progress):
                observer.begin(batch)
                output = model(**batch) if forward is None else forward(model, batch)
                if observer.needs_loss:
                    loss = output if isinstance(output, Tensor) else output.loss
                    if loss is None:
                        raise ConfigError(
                            "lora_ga needs a loss: give batches with labels, or a forward that returns the loss"
                        )
                    loss.backward()
                batch_count += 1
                if observer.is_done():
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not batch_count:
        raise ConfigError("initialize_from_data got no batch; give an iterable of the model's keyword arguments")


@torch.no_grad()
def apply_start(model: nn.Module, name: str, config: LoraConfig, observer: Observer) -> None:
    """Give an adapter the ranks and the factors of an observer.

    Args:
        model: The model with the adapter.
        name: The adapter.
        config: Its configuration.
        observer: An observer that has seen the data.
    """
    ranks = observer.ranks()
    if any(rank != observer.layers[path].r for path, rank in ranks.items()):
        _replace_adapter(model, name, config.with_ranks(ranks, observer.keeps_alpha))
    for path, adapter in cast(dict[str, Lora], adapter_set(model).of_method(name)).items():
        adapter.set_factors(*observer.factors(path, adapter))
        if config.initialisation().subtracts:
            adapter.subtract_start()
    inject.note_changed_base(adapter_set(model), name, adapter_set(model).of_method(name))


def _replace_adapter(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Replace an adapter by a new one with another configuration."""
    adapters = adapter_set(model)
    active = adapters.selection.active
    trainable = any(p.requires_grad for p in adapters.parameters(name))
    inject.delete_adapter(model, name)
    inject.commit_injection(model, inject.prepare_injection(model, config, name), trainable)
    adapters.selection.active = active
