"""`initialize_from_data`: data-driven initialisation of a LoRA adapter (EVA, CorDA, LoRA-GA)."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import ConfigError
from peftcore.init.corda import Corda
from peftcore.init.eva import Eva
from peftcore.init.lora_ga import LoraGa
from peftcore.init.observer import Observer
from peftcore.injection import activation, inject
from peftcore.injection.adapter_set import adapter_set
from peftcore.layers.training_flags import training_flags_restored
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.starts import put, taken_out

_OBSERVERS: dict[str, type[Observer]] = {"eva": Eva, "corda": Corda, "lora_ga": LoraGa}

DATA_INITIALISATIONS = tuple(_OBSERVERS)
"""Values of `init_lora_weights` that need data."""


def initialize_from_data(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    forward: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    progress: bool = True,
) -> None:
    """Initialise a LoRA adapter whose `init_lora_weights` is "eva", "corda" or "lora_ga", in place.

    "eva" may change the ranks of layers, and removes the adapter from layers of rank 0.

    Args:
        model: a model with the adapter.
        batches: keyword arguments of the model, as tensors on its device; a few hundred rows of the training data are
            enough. "lora_ga" needs labels, so that the model returns a loss.
        adapter_name: the adapter.
        forward: called as forward(model, batch) instead of `model(**batch)`.
        progress: True to show a progress bar.

    Raises:
        ConfigError: the adapter has another initialisation, or there is no batch; the adapter is unchanged.
    """
    adapters = adapter_set(model)
    adapters.require(adapter_name)
    config = adapters.configs[adapter_name]
    initialisation = getattr(config, "init_lora_weights", None)
    if initialisation not in _OBSERVERS:
        raise ConfigError(
            f"adapter {adapter_name!r} has init_lora_weights={initialisation!r}; only {', '.join(_OBSERVERS)} need data"
        )
    assert isinstance(config, LoraConfig)
    layers = cast(dict[str, Lora], adapters.of_method(adapter_name))
    if others := [path for path, adapter in layers.items() if adapter.base.kind != "linear"]:
        raise ConfigError(f"init_lora_weights={initialisation!r} fits linear layers only; exclude {others[0]}")
    observer = _OBSERVERS[str(initialisation)](config, layers)
    if not _observe(model, observer, batches, forward, progress):
        raise ConfigError("initialize_from_data got no batch; give an iterable of the model's keyword arguments")
    _apply(model, adapter_name, config, observer)


def _observe(model: Any, observer: Observer, batches: Iterable[Any], forward: Any, progress: bool) -> int:
    """Run the base model over the batches, and return their number."""
    count = 0
    keep_quantized_weights_trainable(model)
    handles = [
        adapter.base.layer.register_forward_hook(observer.hook(path)) for path, adapter in observer.layers.items()
    ]
    try:
        base = activation.adapters_disabled(model)
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
                count += 1
                if observer.is_done():
                    break
    finally:
        for handle in handles:
            handle.remove()
    return count


@torch.no_grad()
def _apply(model: nn.Module, name: str, config: LoraConfig, observer: Observer) -> None:
    ranks = observer.ranks()
    if any(rank != observer.layers[path].r for path, rank in ranks.items()):
        _change_ranks(model, name, config, ranks, keep_scaling=not observer.adjusts_scaling)
    for path, adapter in cast(dict[str, Lora], adapter_set(model).of_method(name)).items():
        a, b = observer.factors(path, adapter)
        put(adapter, (a, b))
        if observer.subtracts_residual:
            adapter.start_A, adapter.start_B = taken_out(adapter)


def _change_ranks(model: nn.Module, name: str, config: LoraConfig, ranks: dict[str, int], keep_scaling: bool) -> None:
    """Replace the adapter by one with other ranks; layers of rank 0 lose the adapter."""
    adapters = adapter_set(model)
    active = adapters.selection.active
    ranks = {path: rank for path, rank in ranks.items() if rank}
    alphas = {}
    for path, rank in ranks.items():
        old_rank, alpha = config.at(path)
        ratio = rank / old_rank
        alphas[path] = alpha * (math.sqrt(ratio) if config.use_rslora else ratio) if keep_scaling else alpha
    changed = dataclasses.replace(
        config, target_modules=sorted(ranks), exclude_modules=None, rank_pattern=ranks, alpha_pattern=alphas
    )
    trainable = any(p.requires_grad for p in adapters.parameters(name))
    inject.delete_adapter(model, name)
    inject.commit_injection(model, inject.prepare_injection(model, changed, name), trainable)
    adapters.selection.active = active
