"""Weights of a model from before it was quantised, read one at a time."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from peftcore.errors import CheckpointError, SizeMismatchError

Source = str | os.PathLike[str] | Mapping[str, Tensor] | None
"""A directory of safetensors, one such file, {parameter path: tensor}, or None: where the model was loaded from."""


class OriginalWeights:
    """The original weights of some layers of a quantised model.

    Args:
        model: The quantised model.
        source: The original weights.
        shapes: {path of a layer: shape of its weight}.

    Raises:
        CheckpointError: The source is not found, lacks a weight, or has one of another shape.
    """

    def __init__(self, model: Any, source: Source, shapes: Mapping[str, tuple[int, ...]]):
        self._tensors = source if isinstance(source, Mapping) else {}
        self._files: dict[str, Path] = {}
        if not isinstance(source, Mapping):
            self._files = _keys(_directory(model) if source is None else Path(source))
        # a checkpoint of the model without its head has keys without this prefix
        head = f"{getattr(model, 'base_model_prefix', '')}."
        self._names: dict[str, str] = {}
        for path, shape in shapes.items():
            names = (f"{path}.weight", f"{path}.weight".removeprefix(head))
            name = next((name for name in names if name in self._tensors or name in self._files), None)
            if name is None:
                raise CheckpointError(
                    f"no {path}.weight in the original weights; give the weights of the model that was quantised"
                )
            self._names[path] = name
            if (given := self._shape(name)) != shape:
                raise SizeMismatchError(
                    f"{name} of the original weights is {given}, and the layer's weight is {shape}; give the weights "
                    "of the model that was quantised"
                )

    def read(self, path: str) -> Tensor:
        """Return the original weight of the layer at `path`, in its own dtype."""
        name = self._names[path]
        if name in self._tensors:
            return self._tensors[name].detach()
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        with safe_open(self._files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())


def _directory(model: Any) -> Path:
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
            f"the original weights: {name!r} is no directory, and is not in the hub's cache; give the original "
            "model's directory as model_path"
        ) from error


def _keys(place: Path) -> dict[str, Path]:
    """Return {key: file} of a directory of safetensors, or of one such file."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"no safetensors in {place}; give the original model's directory as model_path")
    keys: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys |= dict.fromkeys(tensors.keys(), file)
    return keys
