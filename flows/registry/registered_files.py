"""The files of a registered version, as DVC kept them and as they were registered."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.errors import RegistryError
from flows.paths import Paths
from flows.registry.registry import Registry, Version
from flows.runtime.project import files_at
from peftcore.files import sha256


@contextmanager
def files_of(paths: Paths, registry: Registry, version: Version, wanted: Sequence[Path]) -> Iterator[Paths]:
    """A temporary folder with the outputs `wanted` (paths below `paths.root`) of a version; what it is judged by and
    its data have the digests of its record.

    DVC verifies what it pulls, but not what it gets from another commit. Raises RegistryError.
    """
    record = registry.record(version)
    names = [path.relative_to(paths.root).as_posix() for path in wanted]
    with files_at(paths.root, version.commit, names) as folder:
        damaged = [
            name
            for name, digest in record["evidence"].items()
            if (folder / name).is_file() and sha256(folder / name) != digest
        ]
        data = paths.data.relative_to(paths.root).as_posix()
        if data in names and dvc_digest(folder / data) != record["dvc"].get(data):
            damaged.append(data)
        for name in damaged:
            raise RegistryError(
                f"{name} of {version.tag} is not what was registered: DVC's cache or remote is damaged; remove "
                "the damaged file there and `dvc push` it again from a machine that has it"
            )
        yield Paths(folder)


def check_adapter(adapter: Path, registry: Registry, version: Version) -> None:
    """RegistryError unless the adapter's files are those that were registered."""
    for name, digest in registry.record(version)["adapter"]["files"].items():
        if not (adapter / name).is_file() or sha256(adapter / name) != digest:
            raise RegistryError(
                f"{name} of {version.tag} is not what was registered, so it cannot be used; `dvc push` it from "
                "a machine that has it, or roll back to another version (`peftcore rollback --to`)"
            )


def dvc_digest(folder: Path) -> str:
    """What dvc.lock says of a folder: the MD5 of a list of its files, by their path, with theirs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": _md5(path.read_bytes()), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return _md5(json.dumps(sorted(listed, key=lambda one: one["relpath"]), sort_keys=True).encode()) + ".dir"


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
