"""The tensors of an adapter: read from its directory with every check that needs no model, and whole or in shards."""

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

from peftcore.errors import CheckpointError
from peftcore.files import CONFIG_NAME, MANIFEST, damaged_files, whole_files

WEIGHTS_NAME = "adapter_model.safetensors"
PROMPT_STATE = "prompt_encoder.safetensors"
"""What a prompt is computed from; PEFT keeps the computed prompt alone, and reads past this file."""
PREFIX = "base_model.model."
"""What stands before the path of a layer in every key."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_TRAINER_STATE = "trainer_state.json"
_TRAINER_ARGUMENTS = "training_args.bin"
"""A pickle that Trainer puts beside whatever it saves; it is never opened here."""
_LONGEST_HEADER = 32 << 20
"""Bytes, of about 200,000 tensors; safetensors itself reads 100 MB, which take gigabytes once they are parsed."""
_MOST_DIMENSIONS = 16
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Types of adapters' tensors by their name in a file."""
_FIELDS = (b'"data_offsets":', b'"dtype":', b'"shape":')
"""As they stand in a header that a library wrote, once for each tensor."""


def read_tensors(directory: Path, check_manifest: bool = True) -> dict[str, Tensor]:
    """The tensors of an adapter directory, on the CPU, in memory of their own.

    check_manifest: hash what is read, as whoever reads a directory for the first time should.
    Raises CheckpointError as `read_weights` and `parsed` do.
    """
    directory = whole_files(directory)
    content = read_weights(directory)
    if check_manifest:
        warn_of_changes(directory, changed_files(directory, content))
    return parsed(content, directory)


def read_weights(directory: Path) -> memoryview:
    """The bytes of an adapter directory's tensors; read into memory of their own.

    Raises CheckpointError for a missing or truncated file. Warns of pickles beside the file; none is ever opened.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no adapter directory {directory}; give the one that save_pretrained wrote")
    directory = whole_files(directory)
    refuse_pickles(directory)
    if pickles := _pickles(directory):
        warnings.warn(
            f"{directory} holds {', '.join(pickles)} beside {WEIGHTS_NAME}: pickles can run code when they are read; "
            "they are not read here",
            stacklevel=5,
        )
    return read_file(directory / WEIGHTS_NAME)


def refuse_pickles(directory: Path) -> None:
    """CheckpointError for a directory whose tensors are in a pickle only."""
    if (pickles := _pickles(directory)) and not os.path.lexists(directory / WEIGHTS_NAME):
        raise CheckpointError(
            f"{directory} holds no {WEIGHTS_NAME} but {', '.join(pickles)}: a pickle can run code when it is read; "
            "convert it to safetensors where you trust it"
        )


def _pickles(directory: Path) -> list[str]:
    """Names of pickles in a directory, but those that Trainer puts into a checkpoint."""
    if not directory.is_dir():
        return []
    names = [file.name for file in directory.iterdir() if file.suffix in PICKLES and file.name != _TRAINER_ARGUMENTS]
    if (directory / _TRAINER_STATE).exists():
        names = [name for name in names if name == "adapter_model.bin"]
    return sorted(names)


def read_file(path: Path) -> memoryview:
    """The bytes of one file of tensors, in memory of their own. Raises CheckpointError for none, or one too large."""
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; the adapter was not saved whole")
    # without O_NONBLOCK opening a pipe, should one have taken the file's place, waits for somebody to write
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no ordinary file; take another copy")
        # a hole of terabytes takes no room on a disk
        if status.st_size > _machine_memory():
            raise CheckpointError(f"{path} has {status.st_size:,} bytes, which is more than this machine's memory")
        try:
            content = _memory(status.st_size)
        except (OSError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{path}: no memory for its {status.st_size:,} bytes ({error})") from error
        return content[: file.readinto(content)]


@cache
def _machine_memory() -> int:
    """Bytes; without limit where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def changed_files(directory: Path, content: memoryview) -> list[str]:
    """Names in the directory's manifest of files that have changed since, and that may be read all the same.

    These are a configuration that was edited, files that no adapter is read from, and everything where weights and
    configuration have both changed: another program has then saved an adapter there and left our manifest as it was.
    Raises CheckpointError for weights that changed alone, which is damage, and for a manifest that is none.
    """
    changed = damaged_files(directory, {WEIGHTS_NAME: content})
    read = [name for name in changed if name in (WEIGHTS_NAME, PROMPT_STATE, MANIFEST)]
    if read and (MANIFEST in read or CONFIG_NAME not in changed):
        raise CheckpointError(f"{directory}: {', '.join(changed)} is not what {MANIFEST} says; take another copy")
    return changed


def warn_of_changes(directory: Path, names: list[str]) -> None:
    """Warn that files are not what the manifest says."""
    if names:
        warnings.warn(
            f"{directory}: {', '.join(sorted(names))} is not what {MANIFEST} says, because somebody has edited it or "
            f"another program has saved here; it is loaded all the same. If that is right, save the adapter again",
            stacklevel=5,
        )


def _memory(size: int) -> memoryview:
    """Fresh memory of so many bytes; mapped at once where the system can, for touching it page by page is slow."""
    if not size:
        return memoryview(bytearray())
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE} if sys.platform == "linux" else {}
    return memoryview(mmap.mmap(-1, size, **flags))


def parsed(content: memoryview, directory: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """The tensors in what `read_weights` gave for a directory; CheckpointError where it holds none that are whole."""
    if (views := _views(content)) is not None:
        return views
    path = directory / name
    length = int.from_bytes(content[:8], "little")
    if _LONGEST_HEADER < length <= len(content):
        raise CheckpointError(f"{path} has a header of {length:,} bytes; more than {_LONGEST_HEADER:,} are not read")
    try:
        tensors = load(bytes(content))
        _refuse_repeated_names(content[8 : 8 + length])
        return tensors
    # the library judges most; torch what is left, such as sizes of no tensor
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); take another copy") from error


def _refuse_repeated_names(header: memoryview) -> None:
    """ValueError for a name or a field given twice, of which readers choose differently."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    json.loads(bytes(header), object_pairs_hook=once)


def _views(content: memoryview) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file where they lie in its bytes; None where the library has to judge.

    It copies each, which takes as long as all else that loading an adapter does.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= min(len(content), _LONGEST_HEADER):
        return None
    text = bytes(content[8:start])
    count = text.count(_FIELDS[0])
    # what nests otherwise takes gigabytes once it is parsed here; a field given twice is the library's to judge
    if text.count(b"[") != 2 * count or not count < text.count(b"{") < count + 3:
        return None
    if any(text.count(field) != count for field in _FIELDS):
        return None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        if len(header) != count:  # a name given twice
            return None
        entries = sorted(
            (*e["data_offsets"], name, tuple(e["shape"]), _DTYPES[e["dtype"]]) for name, e in header.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    at = 0
    for entry in entries:
        if len(entry) != 5 or {*map(type, entry[:2]), *map(type, entry[3])} - {int}:
            return None
        begin, end, _, shape, dtype = entry
        size = dtype.itemsize
        if len(shape) > _MOST_DIMENSIONS:  # the product of a million numbers takes hours
            return None
        if begin != at or min(shape, default=0) < 0 or end - begin != math.prod(shape) * size or (start + begin) % size:
            return None
        at = end
    if not entries or start + at != len(content):
        return None
    parts = torch.frombuffer(content, dtype=torch.uint8)[start:].split([end - begin for begin, end, *_ in entries])
    named = zip(entries, parts, strict=True)
    try:
        return {name: part.view(dtype).view(shape) for (_, _, name, shape, dtype), part in named}
    except (RuntimeError, TypeError, OverflowError):  # empty, and yet of sizes that no tensor has
        return None


# -- shards ------------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each process may hold a part."""
    return hasattr(tensor, "full_tensor")  # no import of torch.distributed.tensor where nothing is distributed


def whole(tensor: Tensor) -> Tensor:
    """A DTensor put together from all processes' parts, which all have to ask; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def writing_shards(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Context in which a whole tensor can be copied into each of these, sharded or not."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
