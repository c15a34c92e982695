"""LoftQ (arXiv:2310.08659) on a quantised base: the initial adapter corrects the quantisation error."""

import os
from collections.abc import Callable, Collection, Mapping
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
    peft_model: Any,
    model_path: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
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
    # a checkpoint of the model without its head has keys without this prefix
    head = f"{getattr(peft_model, 'base_model_prefix', '')}."
    names = {path: (f"{path}.weight", f"{path}.weight".removeprefix(head)) for path in adapters}
    if isinstance(model_path, Mapping):
        original = model_path
    else:
        wanted = {name for pair in names.values() for name in pair}
        original = _originals(_files(peft_model) if model_path is None else Path(model_path), wanted)
    for path, adapter in adapters.items():
        if (weight := next((original[name] for name in names[path] if name in original), None)) is None:
            raise CheckpointError(
                f"no {path}.weight in the original weights; give the weights of the model that was quantised"
            )
        before = adapter.lora_A.clone(), adapter.lora_B.clone()
        residual = weight.float().to(adapter.base.device) - adapter.base.read_unmerged().float()
        _start_at(adapter, principal_factors(residual, adapter.r, adapter.scaling))
        if callback is not None and not callback(peft_model, path):
            _start_at(adapter, before)


def _start_at(adapter: Lora, factors: Factors) -> None:
    adapter.set_factors(*factors)
    adapter.reset_variants()


def _files(model: Any) -> Path:
    """Return the directory of the weights from which a transformers model was loaded."""
    name = getattr(model, "name_or_path", "")
    if not name:
        raise CheckpointError("this model does not know its directory; give the original model's as model_path")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"replace_lora_weights_loftq: {name!r} is no directory, and is not in the hub's cache; give the original "
            "model's directory as model_path"
        ) from error


def _originals(place: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no safetensors in {place}; give the original model's directory as model_path")
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            weights |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in wanted}  # noqa: SIM118
    return weights
