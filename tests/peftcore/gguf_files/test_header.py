"""A header is read whole, or refused, whatever it claims."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from peftcore import GgufError
from peftcore.gguf_files.header import read_gguf_header, write_without_vocabulary


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_float32("x.epsilon", 0.5)
    writer.add_array("x.sizes", [3, 4])
    writer.add_token_list(["a", "bc"])
    writer.add_tensor("one.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two.weight", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def claim(path: Path, *metadata: bytes, tensors: int = 0, keys: int | None = None, version: int = 3) -> Path:
    """A file with these pieces of metadata after the counts."""
    counts = struct.pack("<IQQ", version, tensors, len(metadata) if keys is None else keys)
    path.write_bytes(b"GGUF" + counts + b"".join(metadata))
    return path


def key(name: str, kind: int, *numbers: int, codes: str = "") -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{codes}", kind, *numbers)


def test_metadata_and_places_are_those_of_the_reader(file: Path) -> None:
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    assert header.metadata["general.architecture"] == "llama" and header.metadata["llama.block_count"] == 3
    assert header.metadata["x.epsilon"] == 0.5 and header.metadata["x.sizes"] == (3, 4)
    assert header.metadata["tokenizer.ggml.tokens"] == 2  # an array of strings is only counted
    assert list(header.tensors) == ["one.weight", "two.weight"]
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape)) and entry.kind == tensor.tensor_type
        assert entry.offset == tensor.data_offset


def test_a_copy_without_vocabulary_is_the_same_for_a_reader_of_metadata(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    write_without_vocabulary(read_gguf_header(file), copy)
    whole, bare = gguf.GGUFReader(file), gguf.GGUFReader(copy)
    values = [{name: field.contents() for name, field in reader.fields.items()} for reader in (whole, bare)]
    assert values[0].pop("tokenizer.ggml.tokens") == ["a", "bc"]
    assert values[1].pop("llama.vocab_size") == 2, "what readers take from the tokens"
    assert values[0].pop("GGUF.kv_count") == values[1].pop("GGUF.kv_count"), "one key less and one more"
    assert values[0] == values[1] and values[0]["x.sizes"] == [3, 4]
    tensors = [[(one.name, list(one.shape), one.tensor_type) for one in reader.tensors] for reader in (whole, bare)]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 2
    assert copy.stat().st_size == file.stat().st_size


def test_the_values_of_a_large_file_take_no_room_in_the_copy(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_vocab_size(7)
    writer.add_tensor("one.weight", np.ones((1024, 1024), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_without_vocabulary(read_gguf_header(tmp_path / "large.gguf"), tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").stat().st_blocks * 512 < 2**20 < (tmp_path / "copy.gguf").stat().st_size
    assert gguf.GGUFReader(tmp_path / "copy.gguf").fields["llama.vocab_size"].contents() == 7


def test_every_truncation_of_the_header_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    first = read_gguf_header(file).tensors["one.weight"].offset
    cut = tmp_path / "cut.gguf"
    for length in range(4, first - 32):
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError, match="truncated or damaged"):
            read_gguf_header(cut)


@pytest.mark.parametrize(
    ("metadata", "counts"),
    [
        ([], {"tensors": 2**60}),
        ([], {"keys": 2**60}),
        ([key("a", 9, 4, 2**60, codes="IQ")], {}),
        ([key("a", 9, 8, 2**60, codes="IQ")], {}),
        ([key("a", 8, 2**62, codes="Q")], {}),
        ([struct.pack("<Q", 2**63)], {}),
    ],
)
def test_no_length_is_believed(metadata: list[bytes], counts: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="truncated or damaged"):
        read_gguf_header(claim(tmp_path / "x.gguf", *metadata, **counts))


@pytest.mark.parametrize(
    ("metadata", "counts", "message"),
    [
        ([], {"version": 1}, "version 1; versions 2 and 3"),
        ([key("a", 99)], {}, "unknown type 99"),
        ([key("general.alignment", 4, 0, codes="I")], {}, "general.alignment is 0"),
        ([struct.pack("<Q1sI", 1, b"t", 9)], {"tensors": 1, "keys": 0}, "9 axes"),
        ([struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0)] * 2, {"tensors": 2, "keys": 0}, "same name"),
    ],
)
def test_what_is_damaged_is_named(metadata: list[bytes], counts: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=message):
        read_gguf_header(claim(tmp_path / "x.gguf", *metadata, **counts))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="there is no file"):
        read_gguf_header(tmp_path / "nothing.gguf")
    for content in (b"", b"PK\x03\x04 a zip"):
        (tmp_path / "other.gguf").write_bytes(content)
        with pytest.raises(GgufError, match="is no GGUF file"):
            read_gguf_header(tmp_path / "other.gguf")
