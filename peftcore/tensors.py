"""The tensors of an adapter: read from its directory with every check that needs no model, and whole or in shards."""

import json
import math
import mmap
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from peftcore.errors import CheckpointError
from peftcore.files import MANIFEST, damaged_files

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What stands before the path of a layer in every key."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_TRAINER_STATE = "trainer_state.json"
_TRAINER_ARGUMENTS = "training_args.bin"
"""A pickle that Trainer puts beside whatever it saves; it is never opened here."""
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses a longer one."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Types of adapters' tensors by their name in a file."""


def read_tensors(directory: Path, check_manifest: bool = True) -> dict[str, Tensor]:
    """The tensors of an adapter directory, on the CPU, in memory of their own.

    check_manifest: hash what is read, as whoever reads a directory for the first time should.
    Raises CheckpointError as `read_weights` and `parsed` do.
    """
    content = read_weights(directory)
    if check_manifest:
        check_hashes(directory, content)
    return parsed(content, directory)


def read_weights(directory: Path) -> memoryview:
    """The bytes of an adapter directory's tensors; read into memory of their own.

    Raises CheckpointError for a missing, truncated or altered file, and before reading anything for pickles.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no adapter directory {directory}; give the one that save_pretrained wrote")
    # a Trainer's checkpoint holds its optimiser as pickles; they are never opened here
    foreign = [f.name for f in directory.iterdir() if f.suffix in PICKLES and f.name != _TRAINER_ARGUMENTS]
    foreign = [] if (directory / _TRAINER_STATE).exists() else foreign
    foreign += ["adapter_model.bin"] if (directory / "adapter_model.bin").exists() else []
    if foreign:
        raise CheckpointError(
            f"{directory} holds {', '.join(sorted(set(foreign)))}: a pickle can run code when it is read; "
            "convert it to safetensors where you trust it, and remove it here"
        )
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"no {WEIGHTS_NAME} in {directory}; the adapter was not saved whole")
    content = _memory(path.stat().st_size)
    with path.open("rb") as file:
        content = content[: file.readinto(content)]
    return content


def check_hashes(directory: Path, content: memoryview) -> None:
    """CheckpointError where the directory's manifest says other bytes than those read and those that lie there."""
    if damaged := damaged_files(directory, {WEIGHTS_NAME: content}):
        raise CheckpointError(f"{directory}: {', '.join(damaged)} is not what {MANIFEST} says; take another copy")


def _memory(size: int) -> memoryview:
    """Fresh memory of so many bytes; mapped at once where the system can, for touching it page by page is slow."""
    if not size:
        return memoryview(bytearray())
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE} if sys.platform == "linux" else {}
    return memoryview(mmap.mmap(-1, size, **flags))


def parsed(content: memoryview, directory: Path) -> dict[str, Tensor]:
    """The tensors in what `read_weights` gave for a directory; CheckpointError where it holds none that are whole."""
    if (views := _views(content)) is not None:
        return views
    try:
        return load(bytes(content))
    except SafetensorError as error:
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME} is damaged or truncated ({error}); take another copy"
        ) from error


def _views(content: memoryview) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file where they lie in its bytes; None where the library has to judge.

    It copies each, which takes as long as all else that loading an adapter does.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= min(len(content), _LONGEST_HEADER):
        return None
    try:
        header = json.loads(bytes(content[8:start]))
        header.pop("__metadata__", None)
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
        if begin != at or min(shape, default=0) < 0 or end - begin != math.prod(shape) * size or (start + begin) % size:
            return None
        at = end
    if not entries or start + at != len(content):
        return None
    parts = torch.frombuffer(content, dtype=torch.uint8)[start:].split([end - begin for begin, end, *_ in entries])
    named = zip(entries, parts, strict=True)
    return {name: part.view(dtype).view(shape) for (_, _, name, shape, dtype), part in named}


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
