"""Temporary folders that name their process, so that those of killed processes can be found and removed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory, gettempdir

from flows.runtime.processes import is_noted_alive, this_host


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a new temporary folder, which is removed afterwards, as are those of killed processes with this prefix."""
    for folder in leftovers(prefix):
        shutil.rmtree(folder, ignore_errors=True)
    with TemporaryDirectory(prefix=with_process(prefix)) as folder:
        yield Path(folder)


def with_process(prefix: str) -> str:
    """Return the prefix of a folder's name with the number of this process and digests of its host.

    The digests are for a temporary folder that several hosts share.
    """
    return f"{prefix}{os.getpid()}-{this_host().partition('/')[2].replace('/', '.')}-"


def leftovers(prefix: str) -> list[Path]:
    """Return this user's temporary folders with a prefix of `with_process` whose process was killed."""
    folders = []
    for folder in sorted(Path(gettempdir()).glob(f"{prefix}*")):
        process, *rest = folder.name.removeprefix(prefix).split("-")
        with suppress(FileNotFoundError):  # another process has removed it
            is_own = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
            note = {"pid": process}
            if len(rest) > 1:  # earlier releases noted no host
                note["host"] = f"{gethostname()}/{rest[0].replace('.', '/')}"
            if is_own and process.isdigit() and is_noted_alive(note) is False:
                folders.append(folder)
    return folders
