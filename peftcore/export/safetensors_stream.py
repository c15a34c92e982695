"""Reading and writing of safetensors files one tensor at a time.

A file consists of 8 bytes with the header's length, the header as JSON, and the tensors' bytes
(https://github.com/huggingface/safetensors#format).

Files are read by memory mapping: a tensor needs memory only when its values are used, and the operating system can free
those pages at any time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftcore.errors import ExportError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Header(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """Return {key: memory-mapped tensor} of a model folder, of one file or of shards.

    Raises:
        ExportError: a file is missing or damaged.
    """
    index = folder / INDEX
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else [SINGLE]
    )
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise ExportError(f"{folder} holds no {name}; give a folder with safetensors that save_pretrained wrote")
        try:
            with safe_open(folder / name, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ExportError(f"{folder / name} is damaged or truncated ({error}); take another copy") from error
    return tensors


def shards_of(headers: Mapping[str, Header], max_bytes: int) -> dict[str, list[str]]:
    """Return {file name: keys in order}; each file has as many tensors as fit into `max_bytes`, and at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, header in headers.items():
        if shards[-1] and filled + header.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += header.size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": keys for n, keys in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], headers: Mapping[str, Header]) -> None:
    """Write the index file that tells transformers which file holds which tensor."""
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    elements = sum(torch.Size(header.shape).numel() for header in headers.values())
    metadata = {"total_parameters": elements, "total_size": sum(header.size for header in headers.values())}
    content = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_shard(path: Path, headers: Mapping[str, Header], tensors: Iterable[Tensor]) -> None:
    """Write one file; the tensors come in the order of their headers, and are computed one at a time."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, header in headers.items():
        entries[key] = {
            "dtype": _NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.size],
        }
        offset += header.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for header, data in zip(headers.values(), map(_bytes, tensors), strict=True):
            assert len(data) == header.size, f"{path}: a tensor is {len(data)} bytes, not {header.size}"
            file.write(data)
            del data  # otherwise it stays in memory while the next tensor is computed


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def aligned(headers: Mapping[str, Header]) -> Iterator[tuple[str, Header]]:
    """Yield the headers in safetensors' own order: wide types first, so that all tensors are aligned, then by name."""
    yield from sorted(headers.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
