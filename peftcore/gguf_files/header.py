"""The header of a GGUF file: metadata, and the place of each tensor; a copy for readers that are slow.

Every length that the file claims is checked against the file's size before it is used, so that a damaged or hostile
file costs no more memory than its own size. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peftcore.errors import GgufError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""{type of a metadata value: its `struct` code}"""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_TOKENS = "tokenizer.ggml.tokens"
_VOCABULARY = (_TOKENS, "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_MOST_AXES = 4


class GgufTensor(NamedTuple):
    """The entry of one tensor."""

    shape: tuple[int, ...]
    """Shape in the order of PyTorch; the file stores it reversed."""
    kind: int
    """Number of the type (`ggml_type`)."""
    offset: int
    """First byte in the file."""


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file except the tensors' values."""

    path: Path
    size: int
    """Size of the file (bytes)."""
    metadata: dict[str, Any]
    """Numbers, strings, and arrays of numbers as tuples; an array of strings as its length."""
    tensors: dict[str, GgufTensor]
    metadata_bytes: dict[str, slice]
    """Place of each key and its value in the file."""
    entries_bytes: slice
    """Place of the tensors' entries in the file."""


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        GgufError: There is no such file, or it is no GGUF file, truncated, or of an unknown version.
    """
    path = Path(path)
    if not path.is_file():
        raise GgufError(f"there is no file {path}; give the path of a .gguf file")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}; give a .gguf file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, size, data).header()


def write_without_vocabulary(header: GgufHeader, path: Path) -> None:
    """Write a file with the same metadata and tensors, but without the tokeniser's arrays and the tensors' values.

    In place of the values, the file has a hole, which takes no room on the disk. `GGUFReader`, by which transformers
    reads metadata, takes 3.6 s for the arrays of 49,152 tokens.
    """
    places = {name: place for name, place in header.metadata_bytes.items() if name not in _VOCABULARY}
    size_key = f"{header.metadata.get('general.architecture')}.vocab_size"
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts = [data[place] for place in (*places.values(), header.entries_bytes)]
    if size_key not in places and isinstance(size := header.metadata.get(_TOKENS), int):
        key = size_key.encode()
        parts.insert(0, struct.pack(f"<Q{len(key)}sII", len(key), key, _UINT32, size))
    counts = struct.pack("<IQQ", VERSIONS[-1], len(header.tensors), len(parts) - 1)
    with path.open("wb") as file:
        file.write(MAGIC + counts + b"".join(parts))
        file.truncate(header.size)


class _Reader:
    def __init__(self, path: Path, size: int, data: mmap.mmap):
        self._path, self._size, self._data = path, size, data
        self._position = len(MAGIC)

    def header(self) -> GgufHeader:
        version, tensors, keys = self._numbers("IQQ")
        if version not in VERSIONS:
            raise GgufError(
                f"{self._path} is of GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are "
                "supported; convert it again with a current llama.cpp"
            )
        metadata, places = dict[str, Any](), dict[str, slice]()
        for _ in range(keys):
            start, key = self._position, self._string()
            metadata[key] = self._value(*self._numbers("I"))
            places[key] = slice(start, self._position)
        start = self._position
        entries = {self._string(): self._entry() for _ in range(tensors)}
        entries_bytes = slice(start, self._position)
        if len(entries) != tensors:
            raise GgufError(f"{self._path} is damaged: two tensors have the same name; get the file again")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise GgufError(f"{self._path} is damaged: general.alignment is {alignment!r}; get the file again")
        start = -(-self._position // alignment) * alignment
        placed = {name: one._replace(offset=start + one.offset) for name, one in entries.items()}
        return GgufHeader(self._path, self._size, metadata, placed, places, entries_bytes)

    def _require(self, count: int) -> None:
        if count > self._size - self._position:
            raise GgufError(
                f"{self._path} is truncated or damaged: its header needs {count:,} bytes at position "
                f"{self._position:,}, and the file has {self._size:,}; get the file again"
            )

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{codes}")
        self._require(width)
        values = struct.unpack_from(f"<{codes}", self._data, self._position)
        self._position += width
        return values

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        self._require(length)
        value = self._data[self._position : self._position + length].decode(errors="replace")
        self._position += length
        return value

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(self._code(kind))[0]
        kind, count = self._numbers("IQ")
        if kind != _STRING:
            code = self._code(kind)
            self._require(count * struct.calcsize(f"<{code}"))
            return self._numbers(f"{count}{code}")
        for _ in range(count):
            (length,) = self._numbers("Q")
            self._require(length)
            self._position += length
        return count

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise GgufError(f"{self._path} is damaged: its metadata has a value of unknown type {kind}; get it again")
        return _NUMBERS[kind]

    def _entry(self) -> GgufTensor:
        (axes,) = self._numbers("I")
        if axes > _MOST_AXES:
            raise GgufError(f"{self._path} is damaged: a tensor has {axes} axes; get the file again")
        shape = self._numbers(f"{axes}Q")
        kind, offset = self._numbers("IQ")
        return GgufTensor(tuple(reversed(shape)), kind, offset)
