"""Temporary folders of this process, and those that killed processes have left."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flows.runtime.temporary import leftovers, temporary_folder

PREFIX = "peftcore-test-"
KILLED = f"""
import os
from flows.runtime.temporary import temporary_folder
with temporary_folder("{PREFIX}") as folder:
    (folder / "version").mkdir()
    os.kill(os.getpid(), 9)
"""


def test_a_folder_goes_with_its_context_or_with_the_next_one_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.iterdir()
    assert leftovers(PREFIX) == [left] and leftovers("peftcore-other-") == []
    with temporary_folder(PREFIX) as folder:
        assert not left.exists()
        with temporary_folder(PREFIX):
            assert folder.is_dir() and leftovers(PREFIX) == []
    assert not folder.exists()
