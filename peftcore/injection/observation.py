"""Runs of a model on calibration data with hooks at some layers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peftcore.bases.quantized import keep_quantized_weights_trainable
from peftcore.errors import ConfigError
from peftcore.injection import activation
from peftcore.injection.adapter_set import ATTRIBUTE
from peftcore.kernels.input_moments import InputMoments
from peftcore.layers.training_flags import training_flags_restored
from peftcore.methods.lora.observer import Observer


def observe(
    model: nn.Module,
    observer: Observer | InputMoments,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None,
    progress: bool,
) -> None:
    """Run the base in eval mode on the batches, with the observer's hooks at its layers.

    Args:
        model: The model; its adapters are disabled meanwhile.
        observer: The observer.
        layers: {path: layer to observe}.
        batches: Keyword arguments of the model.
        forward: Function to call as `forward(model, batch)` instead of `model(**batch)`.
        progress: Show a progress bar.

    Raises:
        ConfigError: There is no batch, a batch is no mapping, or there is no loss although the observer needs one.
    """
    keep_quantized_weights_trainable(model)
    handles = [layer.register_forward_hook(observer.hook(path)) for path, layer in layers.items()]
    count = 0
    try:
        base = activation.adapters_disabled(model) if ATTRIBUTE in vars(model) else nullcontext()
        with training_flags_restored(model), base, torch.set_grad_enabled(observer.needs_loss):
            model.eval()
            for batch in tqdm(batches, desc=observer.title, unit="batch", disable=not progress):
                if forward is None and not isinstance(batch, Mapping):
                    raise ConfigError(
                        f"{observer.title}: a batch is a dictionary of the model's arguments, such as "
                        f"{{'input_ids': ids}}; got {type(batch).__name__}; give such dictionaries, or `forward`"
                    )
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
    if not count:
        raise ConfigError(f"{observer.title} got no batch; give an iterable of the model's keyword arguments")
