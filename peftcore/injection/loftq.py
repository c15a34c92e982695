"""LoftQ (arXiv:2310.08659) on a quantised base: the initial adapter corrects the quantisation error."""

from collections.abc import Callable
from typing import Any, cast

import torch

from peftcore.errors import ConfigError
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.original_weights import OriginalWeights, Source
from peftcore.kernels.maths import weight_shape
from peftcore.methods.lora import Lora
from peftcore.methods.lora.initialisation import Factors, principal_factors


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: Source = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Set A and B so that quantised weight + s·BA is the best approximation of the original weight, in place.

    DoRA's magnitudes become the norms of the rows of that sum. The base is not changed.

    Args:
        peft_model: a model with a LoRA adapter on a quantised base.
        model_path: the original weights: a directory of safetensors, one such file, or {parameter path: tensor}; None
            for the directory, or the hub's cache, from which the model was loaded.
        adapter_name: the adapter.
        callback: called as callback(peft_model, path) after each layer; if it returns False, the layer's factors are
            reset.

    Raises:
        ConfigError: a layer is not quantised.
        CheckpointError: an original weight is missing.
    """
    adapters = cast(dict[str, Lora], adapter_set(peft_model).of_method(adapter_name))
    plain = [path for path, adapter in adapters.items() if not adapter.base.quantized]
    if plain or not adapters:
        raise ConfigError(f"replace_lora_weights_loftq needs layers in 4 or 8 bits; not quantised: {plain[:1]}")
    original = OriginalWeights(peft_model, model_path, {path: weight_shape(a.base) for path, a in adapters.items()})
    for path, adapter in adapters.items():
        before = adapter.lora_A_weight.clone(), adapter.lora_B_weight.clone()
        residual = original.read(path).float().to(adapter.base.device) - adapter.base.read_unmerged().float()
        _start_at(adapter, principal_factors(residual, adapter.r, adapter.scaling))
        if callback is not None and not callback(peft_model, path):
            _start_at(adapter, before)


def _start_at(adapter: Lora, factors: Factors) -> None:
    adapter.set_factors(*factors)
    adapter.reset_variants()
