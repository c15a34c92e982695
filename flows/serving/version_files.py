"""The adapter directory of a registered version, checked against its record."""

import shutil
from pathlib import Path

from flows.errors import RegistryError
from flows.paths import Paths
from flows.registry.reader import RegistryReader, Version
from flows.runtime.project import files_at
from peftcore.files import sha256


def adapter_files(paths: Paths, registry: RegistryReader, version: Version, folder: Path) -> Path:
    """Copy a version's adapter from DVC's cache or remote into a folder.

    Args:
        paths: The project's files.
        registry: The registry that has the version.
        version: The version.
        folder: Folder for the files of several versions.

    Returns:
        The adapter's directory in `folder`.

    Raises:
        RegistryError: A file is not what was registered.
        RepositoryError: The files are neither in the cache nor on the remote.
    """
    directory = folder / version.commit / version.number
    name = paths.adapter.relative_to(paths.root).as_posix()
    with files_at(paths.root, version.commit, [name]) as fetched:
        for file, digest in registry.record(version)["adapter"]["files"].items():
            if not (fetched / name / file).is_file() or sha256(fetched / name / file) != digest:
                raise RegistryError(
                    f"{file} of {version.tag} is not what was registered: DVC's cache or remote is damaged; "
                    "`dvc push` it again from a machine that has it"
                )
        shutil.copytree(fetched / name, directory, dirs_exist_ok=True)
    return directory
