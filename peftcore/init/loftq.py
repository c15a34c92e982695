"""LoftQ on a base that is quantised already: the adapter takes up what quantising lost. arXiv:2310.08659."""

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
    """Set A and B so that quantised weight + s·BA is as near to the original as rank r allows, in place.

    DoRA's magnitudes become the lengths of that sum's rows. The base stays as it is.

    weights: the original model's directory of safetensors, or {parameter path: tensor}.
    callback: called as callback(model, path) after each layer; False puts that layer's factors back.
    Raises ConfigError if a layer is not quantised, CheckpointError for a weight that is not there.
    """
    adapters = cast(dict[str, Lora], adapter_set(model).of_method(adapter_name))
    plain = [path for path, adapter in adapters.items() if not adapter.base.quantized]
    if plain or not adapters:
        raise ConfigError(f"replace_lora_weights_loftq needs 4- or 8-bit layers; plain: {plain[:1]}")
    original = weights if isinstance(weights, Mapping) else _originals(Path(weights), adapters)
    for path, adapter in adapters.items():
        if (weight := original.get(f"{path}.weight")) is None:
            raise CheckpointError(f"no {path}.weight among the original weights; give those this model was made from")
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
    wanted, found = {f"{path}.weight" for path in adapters}, {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in wanted}  # noqa: SIM118
    return found
