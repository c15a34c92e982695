"""A base as training in 4 bits saw it: its linear layers quantised and dequantised, on the disk and not in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert

from peftcore.errors import require_extra
from peftcore.export.mapped_model import key_of
from peftcore.export.safetensors_stream import Header, write_shard

STORAGES = ("nf4", "fp4")
SCRATCH = "dequantised.safetensors"


def dequantised_tensors(
    model: Any, tensors: dict[str, Tensor], storage: str, double_quant: bool, scratch: Path
) -> dict[str, Tensor]:
    """The tensors of a mapped model with its linear layers rounded as bitsandbytes' `load_in_4bit` rounds them.

    Those are mapped from the file `SCRATCH` in `scratch`, made one at a time, and stand in the model's layers from now
    on. Output head and tied weights stay as they are, as transformers leaves them.
    """
    kept = set(get_keys_to_not_convert(model))
    layers = {
        key: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(path == name or path.startswith(f"{name}.") for name in kept)
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
