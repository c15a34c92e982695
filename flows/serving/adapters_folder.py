"""Adapters of a folder, some of which DVC pulls when they are first used."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.base.calibrated import check_adapter
from flows.errors import BaseModelError, RepositoryError
from flows.runtime.project import dvc
from peftcore.errors import CheckpointError, ConfigError
from peftcore.files import CONFIG_NAME

if TYPE_CHECKING:
    from peftcore.routing import AdapterStore


def register_adapters(store: "AdapterStore", folder: Path, calibrated: str | None = None) -> list[str]:
    """Register the adapters of a folder: its adapter directories, and those that its `NAME.dvc` files track.

    DVC pulls a tracked directory that is absent when it is first used.

    Args:
        store: The store.
        folder: The folder of adapters.
        calibrated: Identity of the store's base if it is a calibrated one.

    Returns:
        The names of the adapters.

    Raises:
        ConfigError: The folder has no adapters.
        BaseModelError: An adapter was trained on another calibrated base.
    """
    directories, tracked = check_folder(folder)
    sources = {**directories, **{name: partial(_pulled, pointer, calibrated) for name, pointer in tracked.items()}}
    for directory in directories.values():
        check_adapter(directory, calibrated)
    for name, source in sources.items():
        store.register(name, source)
    return list(sources)


def check_folder(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return {name: adapter directory} and {name: .dvc file} of a folder. Raise ConfigError if there are none."""
    tracked = {pointer.stem: pointer for pointer in sorted(folder.glob("*.dvc")) if pointer.is_file()}
    directories = {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{CONFIG_NAME}"))}
    if not directories and not tracked:
        raise ConfigError(
            f"{folder} holds no adapters; an adapter is a directory with an {CONFIG_NAME}, or a NAME.dvc file that "
            "`dvc add` made of one"
        )
    return directories, tracked


def _pulled(pointer: Path, calibrated: str | None) -> Path:
    """Return the directory that a `.dvc` file tracks.

    Raises:
        CheckpointError: No remote has it, or its adapter was trained on another calibrated base.
    """
    directory = pointer.with_suffix("")
    if not (directory / CONFIG_NAME).is_file():
        try:
            dvc(pointer.parent.resolve(), "pull", "--quiet", pointer.name)
        except RepositoryError as error:
            raise CheckpointError(f"{pointer}: {error}; `dvc push` it from a machine that has it") from error
    try:
        check_adapter(directory, calibrated)
    except BaseModelError as error:
        raise CheckpointError(str(error)) from error
    return directory
