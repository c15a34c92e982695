"""A model whose parameters are memory-mapped from its safetensors files, so that it needs almost no memory.

Adapters are loaded onto it like onto any other model. `dequantised_tensors` gives its linear layers the weights with
which training in 4 bits computes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert

from peftcore.errors import ExportError, require_extra
from peftcore.export.safetensors_stream import Header, write_shard

STORAGES = ("nf4", "fp4")
SCRATCH = "dequantised.safetensors"
"""File name of the dequantised weights."""


def mapped_model(folder: Path, tensors: dict[str, Tensor]) -> Any:
    """Make the model of a transformers folder, with the tensors of `mapped_tensors` as its parameters.

    Raises:
        ExportError: the model is quantised, is of an unknown class, or does not fit its files.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{folder} is quantised; give the 16- or 32-bit model, or use merge_and_unload")
    name = next(iter(config.architectures or []), None)
    if name is None or not hasattr(transformers, name):
        raise ExportError(f"{folder / 'config.json'}: architectures must name a class of transformers; got {name!r}")
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config).eval()
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = key_of(path, model, tensors)
        if key is None:
            if path not in model.all_tied_weights_keys:
                raise ExportError(f"{folder} holds no {path}, which {name} needs; use merge_and_unload")
            continue
        if tensors[key].shape != parameter.shape:
            raise ExportError(
                f"{folder}: {key} has the shape {list(tensors[key].shape)}, and {name} with this config.json has "
                f"{list(parameter.shape)}; take another copy of the model"
            )
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensors[key], requires_grad=False)
    model.tie_weights()
    return model


def key_of(path: str, model: Any, tensors: dict[str, Tensor]) -> str | None:
    """Return a parameter's key in the files, which may lack the prefix of the body below a head; None if absent."""
    short = path.removeprefix(f"{model.base_model_prefix}.")
    return next((key for key in (path, short) if key in tensors), None)


def dequantised_tensors(
    model: Any, tensors: dict[str, Tensor], storage: str, double_quant: bool, scratch: Path
) -> dict[str, Tensor]:
    """Quantise and dequantise the linear layers of a mapped model, as bitsandbytes' `load_in_4bit` rounds them.

    The rounded weights are written to the file `SCRATCH` in the folder `scratch`, one at a time, and mapped from there
    into the model. Output head and tied weights are not rounded, as in transformers. Returns the tensors by key, with
    the rounded ones in place of the base's.
    """
    unconverted = set(get_keys_to_not_convert(model))
    layers = {
        key: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(path == name or path.startswith(f"{name}.") for name in unconverted)
        and (key := key_of(f"{path}.weight", model, tensors)) is not None
    }
    file = scratch / SCRATCH
    headers = {key: Header(tensors[key].dtype, tuple(tensors[key].shape)) for key in layers}
    write_shard(file, headers, _rounded(tensors, headers, storage, double_quant))
    with safe_open(file, "pt") as opened:
        rounded = {key: opened.get_tensor(key) for key in layers}
    for key, module in layers.items():
        module._parameters["weight"] = nn.Parameter(rounded[key], requires_grad=False)
    return tensors | rounded


def _rounded(
    tensors: dict[str, Tensor], headers: dict[str, Header], storage: str, double_quant: bool
) -> Iterator[Tensor]:
    require_extra("quant", "rounding to 4 bits", "bitsandbytes")
    import bitsandbytes.functional as bnb

    for key in headers:
        weight = tensors[key].contiguous()
        yield bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type=storage, compress_statistics=double_quant)).to(
            weight.dtype
        )
