"""Files of a registered version, taken from DVC and checked against the version's record."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.errors import RegistryError
from flows.paths import Paths
from flows.registry.reader import RegistryReader, Version
from flows.runtime.project import files_at
from peftcore.files import sha256


@contextmanager
def files_of(paths: Paths, registry: RegistryReader, version: Version, wanted: Sequence[Path]) -> Iterator[Paths]:
    """Put outputs of a version into a temporary folder, which the context manager gives and removes.

    DVC verifies files that it pulls, but not files that it gets from another commit. So the evidence, the data and the
    calibrated base are compared with the digests of the version's record.

    Args:
        paths: the repository.
        registry: the registry.
        version: the version.
        wanted: the outputs, as paths below `paths.root`.

    Raises:
        RegistryError: a file differs from the registered one.
    """
    record = registry.record(version)
    names = [path.relative_to(paths.root).as_posix() for path in wanted]
    with files_at(paths.root, version.commit, names) as folder:
        damaged = [
            name
            for name, digest in record["evidence"].items()
            if (folder / name).is_file() and sha256(folder / name) != digest
        ]
        for output in (paths.data, paths.calibrated):
            name = output.relative_to(paths.root).as_posix()
            if name in names and dvc_digest(folder / name) != record["dvc"].get(name):
                damaged.append(name)
        for name in damaged:
            raise RegistryError(
                f"{name} of {version.tag} differs from the registered file: DVC's cache or remote is damaged; remove "
                "the damaged file there and `dvc push` it again from a machine that has it"
            )
        yield Paths(folder)


def check_adapter(adapter: Path, registry: RegistryReader, version: Version) -> None:
    """Check an adapter's files against the version's record. Raises RegistryError if a file differs."""
    for name, digest in registry.record(version)["adapter"]["files"].items():
        if not (adapter / name).is_file() or sha256(adapter / name) != digest:
            raise RegistryError(
                f"{name} of {version.tag} differs from the registered file, so it cannot be used; `dvc push` it from "
                "a machine that has it, or roll back to another version (`peftcore rollback --to`)"
            )


def dvc_digest(folder: Path) -> str:
    """Return a folder's digest as dvc.lock has it: the MD5 of the sorted list of its files with their MD5."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": _md5_of(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return _md5(json.dumps(sorted(listed, key=lambda one: one["relpath"]), sort_keys=True).encode()) + ".dir"


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
