"""Adapter tensors: reading from a directory, with all checks that need no model, and access to sharded tensors."""

import json
import math
import mmap
import os
import stat
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from peftcore.errors import CheckpointError, pickle_advice
from peftcore.files import CONFIG_NAME, MANIFEST, PROMPT_STATE, WEIGHTS_NAME, damaged_files, whole_files

PREFIX = "base_model.model."
"""Prefix of every checkpoint key, in front of the layer's path."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_READ = (CONFIG_NAME, WEIGHTS_NAME, PROMPT_STATE, MANIFEST)
"""Files that loading an adapter reads."""
_TRAINER_STATE = "trainer_state.json"
_TRAINER_ARGUMENTS = "training_args.bin"
"""A pickle that Trainer writes into each checkpoint; never opened here."""
_LONGEST_HEADER = 32 << 20
"""Limit in bytes, enough for 200,000 tensors; a header of safetensors' own limit, 100 MB, parses into gigabytes."""
_MOST_DIMENSIONS = 16
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""{dtype name in a safetensors header: dtype}"""
_FIELDS = (b'"data_offsets":', b'"dtype":', b'"shape":')
"""Fields that a header contains once for each tensor, as libraries write them."""


def read_tensors(directory: Path, check_manifest: bool = True) -> dict[str, Tensor]:
    """Return the tensors of an adapter directory by key, on the CPU and in newly allocated memory.

    Args:
        directory: An adapter directory.
        check_manifest: Compare the files with the directory's SHA-256 manifest, if there is one.

    Raises:
        CheckpointError: The file is missing, damaged, a pickle, or differs from the manifest.
    """
    directory = whole_files(directory)
    content = read_weights(directory)
    if check_manifest:
        warn_of_changes(directory, changed_files(directory, content))
    return parsed(content, directory)


def read_weights(directory: Path) -> memoryview:
    """Return the bytes of an adapter directory's tensor file, in newly allocated memory.

    Warns about pickles in the directory; they are never opened.

    Raises:
        CheckpointError: The file is missing, a pickle, or too large.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no adapter directory {directory}; give the one that save_pretrained wrote")
    directory = whole_files(directory)
    refuse_pickles(directory)
    if pickles := _pickles(directory):
        warnings.warn(
            f"{directory} holds {', '.join(pickles)} beside {WEIGHTS_NAME}: pickles can run code when they are loaded, "
            "so they are not read",
            stacklevel=5,
        )
    return read_file(directory / WEIGHTS_NAME)


def refuse_pickles(directory: Path) -> None:
    """Raise CheckpointError if the directory has tensors in a pickle only."""
    if (pickles := _pickles(directory)) and not os.path.lexists(directory / WEIGHTS_NAME):
        raise CheckpointError(
            f"{directory} holds no {WEIGHTS_NAME} but {', '.join(pickles)}: {pickle_advice(directory)}"
        )


def _pickles(directory: Path) -> list[str]:
    """Return the names of pickles in a directory, except those that Trainer writes into a checkpoint."""
    if not directory.is_dir():
        return []
    names = [file.name for file in directory.iterdir() if file.suffix in PICKLES and file.name != _TRAINER_ARGUMENTS]
    if (directory / _TRAINER_STATE).exists():
        names = [name for name in names if name == "adapter_model.bin"]
    return sorted(names)


def read_file(path: Path) -> memoryview:
    """Return the bytes of one tensor file, in newly allocated memory.

    Raises:
        CheckpointError: The file is missing, not an ordinary file, or larger than the available memory.
    """
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; the adapter is incomplete, save it again")
    # O_NONBLOCK: opening a named pipe must not wait for a writer
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not an ordinary file; take another copy")
        # a sparse file can claim terabytes
        if status.st_size > _machine_memory():
            raise CheckpointError(
                f"{path} has {status.st_size:,} bytes, more than this machine's memory; take another copy, or a larger "
                "machine"
            )
        try:
            content = _memory(status.st_size)
        except (OSError, ValueError, MemoryError) as error:
            raise CheckpointError(
                f"{path}: not enough memory for {status.st_size:,} bytes ({error}); free some memory"
            ) from error
        return content[: file.readinto(content)]


@cache
def _machine_memory() -> int:
    """Return the machine's physical memory in bytes; the largest integer if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def changed_files(directory: Path, content: memoryview) -> list[str]:
    """Return the names of files that differ from the directory's manifest and may still be read.

    An edited configuration may be read, and so may files that are not part of an adapter. If weights and configuration
    have both changed, another program has saved an adapter here without updating the manifest.

    Args:
        directory: The adapter directory.
        content: The bytes of its tensor file.

    Raises:
        CheckpointError: Only the weights differ, which means damage, or the manifest is unreadable.
    """
    changed = [
        name
        for name in damaged_files(directory, {WEIGHTS_NAME: content})
        # from the hub, only the files of the adapter are downloaded, not what else the manifest lists
        if name in _READ or os.path.lexists(directory / name)
    ]
    read = [name for name in changed if name in _READ and name != CONFIG_NAME]
    if read and (MANIFEST in read or CONFIG_NAME not in changed):
        raise CheckpointError(f"{directory}: {', '.join(changed)} does not match {MANIFEST}; take another copy")
    return changed


def warn_of_changes(directory: Path, names: list[str]) -> None:
    """Warn that files differ from the manifest."""
    if names:
        warnings.warn(
            f"{directory}: {', '.join(sorted(names))} does not match {MANIFEST}: it was edited, or another program "
            "has saved here. The adapter is loaded anyway; if the change is intended, save the adapter again",
            stacklevel=5,
        )


def _memory(size: int) -> memoryview:
    """Allocate memory of `size` bytes; on Linux all pages at once, because page faults are slow."""
    if not size:
        return memoryview(bytearray())
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE} if sys.platform == "linux" else {}
    return memoryview(mmap.mmap(-1, size, **flags))


def parsed(content: memoryview, directory: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, by key.

    Args:
        content: The bytes that `read_weights` returned.
        directory: The directory of the file, for error messages.
        name: The file's name, for error messages.

    Raises:
        CheckpointError: The bytes are damaged or truncated.
    """
    if (views := _views(content)) is not None:
        return views
    path = directory / name
    length = int.from_bytes(content[:8], "little")
    if _LONGEST_HEADER < length <= len(content):
        raise CheckpointError(
            f"{path} has a header of {length:,} bytes, and at most {_LONGEST_HEADER:,} are read; take another copy"
        )
    try:
        tensors = load(bytes(content))
        _refuse_repeated_names(content[8 : 8 + length])
        return tensors
    # safetensors checks most of the header; torch rejects the rest, such as impossible tensor sizes
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); take another copy") from error


def _refuse_repeated_names(header: memoryview) -> None:
    """Raise ValueError for a repeated name or field, which different readers resolve differently."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name is repeated in the header")
        return entries

    json.loads(bytes(header), object_pairs_hook=unique)


def _views(content: memoryview) -> dict[str, Tensor] | None:
    """Return tensors that are views of a safetensors file's bytes; None if the file needs safetensors' own parser.

    safetensors copies each tensor, which takes as long as the rest of loading an adapter.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= min(len(content), _LONGEST_HEADER):
        return None
    text = bytes(content[8:start])
    count = text.count(_FIELDS[0])
    # deeper nesting could take gigabytes to parse; repeated fields are left to safetensors' parser
    if text.count(b"[") != 2 * count or not count < text.count(b"{") < count + 3:
        return None
    if any(text.count(field) != count for field in _FIELDS):
        return None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        if len(header) != count:  # a repeated name
            return None
        entries = sorted(
            (*entry["data_offsets"], name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in header.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    offset = 0
    for entry in entries:
        if len(entry) != 5 or {*map(type, entry[:2]), *map(type, entry[3])} - {int}:
            return None
        begin, end, _, shape, dtype = entry
        size = dtype.itemsize
        if len(shape) > _MOST_DIMENSIONS:  # multiplying a million sizes would take hours
            return None
        if begin != offset or min(shape, default=0) < 0 or end - begin != math.prod(shape) * size:
            return None
        if (start + begin) % size:  # not aligned
            return None
        offset = end
    if not entries or start + offset != len(content):
        return None
    parts = torch.frombuffer(content, dtype=torch.uint8)[start:].split([end - begin for begin, end, *_ in entries])
    named = zip(entries, parts, strict=True)
    try:
        return {name: part.view(dtype).view(shape) for (_, _, name, shape, dtype), part in named}
    except (RuntimeError, TypeError, OverflowError):  # an empty tensor with impossible sizes
        return None


# -- shards ------------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, of which each process may hold a shard."""
    return hasattr(tensor, "full_tensor")  # avoids importing torch.distributed.tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and any other tensor unchanged; all processes must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def writing_shards(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Return a context in which a full tensor can be copied into each parameter, sharded or not."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
