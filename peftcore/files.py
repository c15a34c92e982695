"""Files that are whole or absent: atomic writes, and SHA-256 manifests that say what a directory held.

A write goes to a temporary file in the same directory, is flushed to the disk, then renamed over its target, so
a crash or a full disk leaves the old file or the new one and never half of either.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

MANIFEST = "SHA256SUMS"
"""Manifest's file name; its lines are what `sha256sum --check` reads."""
CONFIG_NAME = "adapter_config.json"
"""File name of an adapter's configuration."""
_COMPLETE = ".saved"
"""Folder inside of a directory: its new files, all whole, while they replace the old ones."""
_LARGEST_MANIFEST = 16 << 20
"""Bytes; about 100,000 files."""


def sha256(path: Path) -> str:
    """Hex SHA-256 of one file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of an ordinary file, or of what a link to one leads to.

    Raises ValueError for one of more than `most` bytes, and for a device or a pipe, which might never end.
    """
    # without O_NONBLOCK the opening of a pipe waits for somebody to write
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no ordinary file")
        content = file.read(most + 1) if status.st_size <= most else b""
        if max(status.st_size, len(content)) > most:
            raise ValueError(f"{path.name} has more than {most:,} bytes")
    return content


def flush_to_disk(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`; on any failure the old file stays and no temporary file is left."""
    with file_written_atomically(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def file_written_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to fill; on success it becomes `path`, on an exception `path` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    fresh = Path(name)
    try:
        yield fresh
        fresh.chmod(0o644)
        flush_to_disk(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


@contextlib.contextmanager
def directory_written_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `path`, on an exception `path` is as it was.

    A directory that stood at `path` before is replaced whole, and on Linux in one step: a process that is killed leaves
    the old one or the new one there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = fresh.with_name(fresh.name + ".old")
    try:
        fresh.chmod(0o755)
        yield fresh
        for file in sorted(fresh.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)  # some writers make files that only their owner can read
            flush_to_disk(file)
        flush_to_disk(fresh)
        if path.exists() and _exchanged(fresh, path):
            old = fresh
        else:
            if path.exists():
                path.rename(old)
            fresh.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    flush_to_disk(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap the names of two directories in one step; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


@contextlib.contextmanager
def files_written_together(directory: Path, owned: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill; its files then replace those of the same names in `directory`, all or none.

    Other files of `directory` stay. On an exception `directory` is as it was. If the process is killed, `whole_files`
    gives either all old files or all new ones, and the next call of this function finishes the replacement.

    owned: names that are removed from `directory` if the new files lack them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _finish_replacement(directory, owned)
    fresh = Path(tempfile.mkdtemp(dir=directory, prefix=".saving-"))
    try:
        fresh.chmod(0o755)
        yield fresh
        for file in sorted(fresh.iterdir()):
            file.chmod(0o644)
            flush_to_disk(file)
        flush_to_disk(fresh)
        while not _renamed(fresh, directory / _COMPLETE):
            _finish_replacement(directory, owned)  # another process has just saved here
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    flush_to_disk(directory)
    _finish_replacement(directory, owned)


def whole_files(directory: Path) -> Path:
    """Where to read the files that `files_written_together` wrote into `directory`.

    It is `directory` itself, unless the process that wrote them was killed while they replaced the old ones.
    """
    complete = directory / _COMPLETE
    return complete if complete.is_dir() else directory


def _renamed(folder: Path, new: Path) -> bool:
    """Rename a folder; False if there is one of that name that holds files."""
    try:
        folder.rename(new)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _finish_replacement(directory: Path, owned: Collection[str]) -> None:
    """Give the complete new files their names in `directory`, if there are such, and then drop their folder."""
    complete = directory / _COMPLETE
    try:
        names = sorted(file.name for file in complete.iterdir())
        for name in names:
            _put_second_name(complete / name, directory / name)
        for name in set(owned) - set(names):
            (directory / name).unlink(missing_ok=True)
        flush_to_disk(directory)
        done = directory / f".saving-{uuid.uuid4().hex}"
        complete.rename(done)
    except FileNotFoundError:  # no new files, or another process has finished their replacement
        return
    flush_to_disk(directory)
    shutil.rmtree(done, ignore_errors=True)


def _put_second_name(file: Path, target: Path) -> None:
    """Replace `target` by `file` and keep `file`: a hard link, or a copy where the file system has no links."""
    second = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        os.link(file, second)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy(file, second)
        flush_to_disk(second)
    second.replace(target)
    second.unlink(missing_ok=True)  # renaming one of a file's names to another of its names does nothing


def write_manifest(directory: Path, names: list[str] | None = None) -> dict[str, str]:
    """Hash files of `directory` into its `SHA256SUMS`; returns {name: hex}.

    names: paths relative to `directory`; None means every file below it but the manifest itself.
    """
    if names is None:
        files = (file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST)
        names = [file.relative_to(directory).as_posix() for file in files]
    entries = {name: sha256(directory / name) for name in sorted(names)}
    write_atomically(directory / MANIFEST, manifest_text(entries))
    return entries


def manifest_text(entries: Mapping[str, str]) -> str:
    """What a manifest of {name: hex} says."""
    return "".join(f"{digest}  {name}\n" for name, digest in entries.items())


def read_manifest(directory: Path) -> dict[str, str]:
    """{name: hex} of a manifest, empty where the directory has none.

    What it says may be anything: of a manifest that is none, {its own name: ""}.
    """
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        lines = read_limited(path, _LARGEST_MANIFEST).decode().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines if line.strip())}
    except (OSError, ValueError):  # a broken link, bytes that are no text, a line without a name
        return {MANIFEST: ""}


def damaged_files(directory: Path, read: Mapping[str, Any] | None = None) -> list[str]:
    """Names in the manifest whose file is gone, has other bytes or would not be in the directory (it is not looked at);
    empty when all is well.

    read: {name: content, bytes or the like} of files that have been read already.
    """
    held = read or {}

    def is_whole(name: str, digest: str) -> bool:
        if name in held:
            return hashlib.sha256(held[name]).hexdigest() == digest
        if "\0" in name or ".." in (path := PurePath(name)).parts or path.is_absolute():
            return False
        try:
            return (directory / name).is_file() and sha256(directory / name) == digest
        except OSError:  # a name longer than any file's, or a file that cannot be read
            return False

    return [name for name, digest in read_manifest(directory).items() if not is_whole(name, digest)]
