"""Atomic writes of files and directories, and SHA-256 manifests of directories.

`hub.py` finds adapters on the hub, and `tensors.py` reads their tensors.

A write goes to a temporary file in the same directory, is flushed to the disk, and is then renamed over the target. So
a crash or a full disk leaves either the complete old file or the complete new file.
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
"""File name of the manifest, in the format of `sha256sum --check`."""
WEIGHTS_NAME = "adapter_model.safetensors"
"""File name of an adapter's weights."""
PROMPT_STATE = "prompt_encoder.safetensors"
"""File of a prompt encoder's training state; HF PEFT stores the computed prompt only and ignores this file."""
CONFIG_NAME = "adapter_config.json"
"""File name of an adapter's configuration."""
_COMPLETE = ".saved"
"""Folder inside a directory that holds the complete new files while they replace the old ones."""
_LARGEST_MANIFEST = 16 << 20
"""Limit in bytes, enough for 100,000 files."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_limited(path: Path, most: int) -> bytes:
    """Return the bytes of an ordinary file, following symbolic links.

    Args:
        path: The file.
        most: Largest accepted size in bytes.

    Raises:
        ValueError: The file is larger, or is a device or a pipe.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is not an ordinary file")
        content = file.read(most + 1) if status.st_size <= most else b""
        if max(status.st_size, len(content)) > most:
            raise ValueError(f"{path.name} has more than {most:,} bytes")
    return content


def flush_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file `path` by `content`; on any failure the old file stays and no temporary file is left."""
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
    """Yield an empty directory to fill; on success it replaces `path`, on an exception `path` stays unchanged.

    On Linux an existing directory at `path` is replaced in one step: if the process is killed, `path` is either the
    complete old directory or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    previous = new.with_name(new.name + ".old")
    try:
        new.chmod(0o755)
        yield new
        for file in sorted(new.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)  # some writers create files that only their owner can read
            flush_to_disk(file)
        flush_to_disk(new)
        if path.exists() and _exchanged(new, path):
            previous = new
        else:
            if path.exists():
                path.rename(previous)
            new.rename(path)
    except BaseException:
        if previous.exists() and not path.exists():
            previous.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    flush_to_disk(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return False if the system or the file system does not support it."""
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
    """Yield an empty folder to fill; its files then replace the files of the same names in `directory`, all or none.

    Other files of `directory` stay. On an exception `directory` stays unchanged. If the process is killed,
    `whole_files` returns either all old files or all new ones, and the next call of this function finishes the
    replacement.

    Args:
        directory: The directory to update; created if it does not exist.
        owned: File names that are removed from `directory` if the new files lack them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _finish_replacement(directory, owned)
    new = Path(tempfile.mkdtemp(dir=directory, prefix=".saving-"))
    try:
        new.chmod(0o755)
        yield new
        for file in sorted(new.iterdir()):
            file.chmod(0o644)
            flush_to_disk(file)
        flush_to_disk(new)
        while not _renamed(new, directory / _COMPLETE):
            _finish_replacement(directory, owned)  # another process is saving here too
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    flush_to_disk(directory)
    _finish_replacement(directory, owned)


def whole_files(directory: Path) -> Path:
    """Return the folder with a complete set of the files that `files_written_together` wrote.

    The folder is `directory` itself, except after a process was killed during the replacement.
    """
    complete = directory / _COMPLETE
    return complete if complete.is_dir() else directory


def _renamed(folder: Path, new: Path) -> bool:
    """Rename a folder; return False if the new name is a folder with files."""
    try:
        folder.rename(new)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _finish_replacement(directory: Path, owned: Collection[str]) -> None:
    """Move complete new files, if there are any, into `directory`, and remove their folder."""
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
    except FileNotFoundError:  # no new files, or another process has finished the replacement
        return
    flush_to_disk(directory)
    shutil.rmtree(done, ignore_errors=True)


def _put_second_name(file: Path, target: Path) -> None:
    """Replace `target` by a hard link to `file`, or by a copy if the file system has no links."""
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
    """Write the manifest of a directory.

    Args:
        directory: The directory.
        names: Paths relative to `directory`; None for every file below it except the manifest.

    Returns:
        {name: SHA-256 in hexadecimal}.
    """
    if names is None:
        files = (file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST)
        names = [file.relative_to(directory).as_posix() for file in files]
    entries = {name: sha256(directory / name) for name in sorted(names)}
    write_atomically(directory / MANIFEST, manifest_text(entries))
    return entries


def manifest_text(entries: Mapping[str, str]) -> str:
    """Return the text of a manifest of {name: SHA-256 in hexadecimal}."""
    return "".join(f"{digest}  {name}\n" for name, digest in entries.items())


def read_manifest(directory: Path) -> dict[str, str]:
    """Return {name: SHA-256 in hexadecimal} of a directory's manifest.

    The content is untrusted: names and hashes may be any text.

    Returns:
        The entries; {} if there is no manifest; {manifest's name: ""} if the manifest is unreadable.
    """
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        lines = read_limited(path, _LARGEST_MANIFEST).decode().splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines if line.strip())}
    except (OSError, ValueError):  # a broken link, bytes that are not text, a line without a name
        return {MANIFEST: ""}


def damaged_files(directory: Path, read: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of files that do not match the directory's manifest.

    A file does not match if it is missing, has other bytes, or has a path outside of the directory; files outside are
    not opened.

    Args:
        directory: The directory.
        read: {name: content as a bytes-like object} of files that have already been read.
    """
    contents = read or {}

    def matches(name: str, digest: str) -> bool:
        if name in contents:
            return hashlib.sha256(contents[name]).hexdigest() == digest
        if "\0" in name or ".." in (path := PurePath(name)).parts or path.is_absolute():
            return False
        try:
            return (directory / name).is_file() and sha256(directory / name) == digest
        except OSError:  # the name is too long, or the file cannot be read
            return False

    return [name for name, digest in read_manifest(directory).items() if not matches(name, digest)]
