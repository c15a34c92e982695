"""LoftQ (arXiv:2310.08659) on a quantised base: the initial adapter corrects the quantisation error."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from peftcore.errors import CheckpointError, ConfigError
from peftcore.injection.adapter_set import adapter_set
from peftcore.methods.lora import Lora
from peftcore.methods.lora.initialisation import Factors, principal_factors


@torch.no_grad()
def replace_lora_weights_loftq(
    model: Any,
    weights: str | Path | Mapping[str, Tensor],
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Set A and B so that quantised weight + s·BA is the best approximation of the original weight, in place.

    DoRA's magnitudes become the norms of the rows of that sum. The base is not changed.

    Args:
        model: a model with a LoRA adapter on a quantised base.
        weights: the original model's directory of safetensors, or {parameter path: tensor}.
        adapter_name: the adapter.
        callback: called as callback(model, path) after each layer; if it returns False, the layer's factors are reset.

    Raises:
        ConfigError: a layer is not quantised.
        CheckpointError: an original weight is missing.
    """
    adapters = cast(dict[str, Lora], adapter_set(model).of_method(adapter_name))
    plain = [path for path, adapter in adapters.items() if not adapter.base.quantized]
    if plain or not adapters:
        raise ConfigError(f"replace_lora_weights_loftq needs layers in 4 or 8 bits; not quantised: {plain[:1]}")
    original = weights if isinstance(weights, Mapping) else _originals(Path(weights), adapters)
    for path, adapter in adapters.items():
        if (weight := original.get(f"{path}.weight")) is None:
            raise CheckpointError(
                f"no {path}.weight in the original weights; give the weights of the model that was quantised"
            )
        before = adapter.lora_A.clone(), adapter.lora_B.clone()
        residual = weight.float().to(adapter.base.device) - adapter.base.read_unmerged().float()
        _start_at(adapter, principal_factors(residual, adapter.r, adapter.scaling))
        if callback is not None and not callback(model, path):
            _start_at(adapter, before)


def _start_at(adapter: Lora, factors: Factors) -> None:
    adapter.set_factors(*factors)
    adapter.reset_variants()


def _originals(directory: Path, adapters: Mapping[str, Lora]) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no safetensors in {directory}; give the original model's directory")
    wanted, weights = {f"{path}.weight" for path in adapters}, {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            weights |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in wanted}  # noqa: SIM118
    return weights
