"""The base model of a merged GGUF file: its metadata and its weights. Weights have GGUF names and are read lazily."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
from gguf.quants import dequantize

from peftcore.errors import ExportError
from peftcore.export.gguf_folder import ModelFolder
from peftcore.gguf_files.layout import GgufLayout, layout_of_file

_NOT_COPIED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
"""Metadata keys that are not copied from the base's file: the exporter writes other values, or leaves the key out."""


@dataclass(frozen=True)
class BaseTensor:
    """One weight of the base."""

    name: str
    shape: tuple[int, ...]
    """Shape in the order of torch and NumPy; GGUF stores it reversed."""
    values: Callable[[], np.ndarray]
    """Reads the values in float32, with the rows in the order of a GGUF file (see `gguf_files.layout`)."""


class GgufBase(Protocol):
    """A base model for a GGUF file."""

    layout: GgufLayout
    tensors: list[BaseTensor]
    label: str
    """Name of the base in error messages: "the file" or "the folder"."""

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Write all metadata except `general.architecture` and `general.file_type`, which the exporter writes."""


def gguf_base(path: str | Path) -> GgufBase:
    """Open the base model at a path, a GGUF file or a transformers folder; ExportError if it is not supported."""
    return _OfFolder(Path(path)) if Path(path).is_dir() else _OfFile(Path(path))


class _OfFile:
    """A base in a GGUF file; its metadata is copied to the new file."""

    label = "the file"

    def __init__(self, path: Path):
        self._reader = gguf.GGUFReader(path)
        parts = self._reader.get_field("split.count")
        if parts is not None and parts.contents() > 1:
            raise ExportError(
                f"{path} is one of {parts.contents()} parts of a model; join them with llama-gguf-split --merge, and "
                "give the whole file"
            )
        self.layout = layout_of_file(self._reader)
        self.tensors = [_of_reader(tensor) for tensor in self._reader.tensors]

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Copy the metadata of the base's file, except the keys of `_NOT_COPIED`."""
        for field in self._fields():
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)

    def _fields(self) -> Iterator[gguf.ReaderField]:
        for field in self._reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in _NOT_COPIED and field.types:
                yield field


def _of_reader(tensor: Any) -> BaseTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return BaseTensor(tensor.name, shape, lambda: dequantize(tensor.data, tensor.tensor_type))


class _OfFolder:
    """A base in a transformers folder; its metadata is computed from the folder's JSON files."""

    label = "the folder"

    def __init__(self, path: Path):
        self._folder = ModelFolder(path)
        self.layout = self._folder.layout
        values: Mapping[str, Any] = self._folder.tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        self.tensors = [
            BaseTensor(name, shapes[name], lambda name=name: self.layout.to_file(
                name.rpartition(".")[0], values[name].float()).contiguous().numpy())
            for name in values
        ]  # fmt: skip

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """Write metadata computed from the folder's configuration and tokenizer."""
        self._folder.write_keys(writer)


def check_gguf_base(path: str | Path) -> None:
    """Check that a transformers folder can be exported as a GGUF model, without reading weights.

    Raises:
        ExportError: the path is not a folder, or the folder's model is not supported.
    """
    if not Path(path).is_dir():
        raise ExportError(f"{path} is not a folder; give the transformers folder of the base, or its GGUF file")
    ModelFolder(Path(path))
