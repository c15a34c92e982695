"""An atomic write replaces a file whole, or leaves it unchanged, and leaves no temporary file."""

from pathlib import Path

import pytest

from peftcore.files import file_written_atomically, write_atomically


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
