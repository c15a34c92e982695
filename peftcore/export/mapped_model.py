"""A model whose parameters are its files, mapped into memory: adapters are loaded onto it as onto any other."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftcore.export.errors import ExportError


def mapped_model(folder: Path, tensors: dict[str, Tensor]) -> Any:
    """The folder's model, each of its parameters a tensor of the files. Raises ExportError."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{folder} is quantised; give the 16- or 32-bit model, or use merge_and_unload")
    name = next(iter(config.architectures or []), None)
    if name is None or not hasattr(transformers, name):
        raise ExportError(f"{folder / 'config.json'} names no class of transformers in architectures; got {name!r}")
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config).eval()
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = key_of(path, model, tensors)
        if key is None:
            if path not in model.all_tied_weights_keys:
                raise ExportError(f"{folder} holds no {path} as this {name} has it; use merge_and_unload")
            continue
        if tensors[key].shape != parameter.shape:
            raise ExportError(f"{folder}: {key} is {list(tensors[key].shape)}, in {name} {list(parameter.shape)}")
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensors[key], requires_grad=False)
    model.tie_weights()
    return model


def key_of(path: str, model: Any, tensors: dict[str, Tensor]) -> str | None:
    """A parameter's key in the files, which may lack the prefix of the body that a head was put on."""
    short = path.removeprefix(f"{model.base_model_prefix}.")
    return next((key for key in (path, short) if key in tensors), None)
