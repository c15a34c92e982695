"""Atomic writes and manifests."""

import os
from pathlib import Path

import pytest

from peftcore.files import (
    MANIFEST,
    damaged_files,
    directory_written_atomically,
    file_written_atomically,
    files_written_together,
    read_limited,
    read_manifest,
    sha256,
    whole_files,
    write_atomically,
    write_manifest,
)


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == {"a"}


def test_a_directory_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for content in ("first", "second"):
        with directory_written_atomically(path) as new:
            (new / content).write_text(content)
    with pytest.raises(RuntimeError), directory_written_atomically(path) as new:
        (new / "third").write_text("third")
        raise RuntimeError
    assert names(path) == {"second"} and names(tmp_path) == {"d"}


def test_files_are_replaced_together_and_others_stay(tmp_path: Path) -> None:
    for name in ("a", "b", "other"):
        (tmp_path / name).write_text("old")
    with files_written_together(tmp_path, owned=["a", "b"]) as new:
        (new / "a").write_text("new")
    assert names(tmp_path) == {"a", "other"} and (tmp_path / "a").read_text() == "new"
    assert whole_files(tmp_path) == tmp_path
    (tmp_path / ".saved").mkdir()  # as after a killed process
    (tmp_path / ".saved" / "a").write_text("newest")
    assert (whole_files(tmp_path) / "a").read_text() == "newest"
    with files_written_together(tmp_path, owned=["a", "b"]) as new:
        assert (tmp_path / "a").read_text() == "newest"
        (new / "a").write_text("last")
    assert names(tmp_path) == {"a", "other"}


def test_a_manifest_names_changed_missing_and_outside_files(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    for name in ("kept", "changed", "missing"):
        (directory / name).write_text(name)
    entries = write_manifest(directory)
    assert read_manifest(directory) == entries and entries["kept"] == sha256(directory / "kept")
    assert damaged_files(directory) == []
    (directory / "changed").write_text("x")
    (directory / "missing").unlink()
    (tmp_path / "outside").write_text("")
    with (directory / MANIFEST).open("a") as file:
        file.write(f"{sha256(tmp_path / 'outside')}  ../outside\n")
    assert set(damaged_files(directory)) == {"changed", "missing", "../outside"}
    assert damaged_files(directory, {"changed": b"changed"}) == ["missing", "../outside"]


def test_a_manifest_that_is_not_text_is_damaged_itself(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    assert damaged_files(tmp_path) == [MANIFEST]


def test_limited_reading_refuses_large_files_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert read_limited(tmp_path / "a", 4) == b"1234"
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_limited(tmp_path / "a", 3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not an ordinary file"):
        read_limited(tmp_path / "pipe", 4)


def test_a_file_is_replaced_whole_and_is_readable_by_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", "text")
    with file_written_atomically(tmp_path / "new" / "file") as fresh:
        fresh.write_text("longer text")
        assert (tmp_path / "new" / "file").read_text() == "text"
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["longer text"]
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == 0o644


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space"), file_written_atomically(tmp_path / "file") as fresh:
        fresh.write_text("half")
        raise OSError(28, "No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
