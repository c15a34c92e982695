"""Conversion of an adapter's pickle, `adapter_model.bin`, to safetensors, in a process of its own.

    python -m peftcore.storage.convert_bin SOURCE NEW_DIRECTORY [--subfolder FOLDER] [--revision REVISION]

The pickle is read with `weights_only=True`: PyTorch then builds tensors only, and refuses everything else.
"""

import argparse
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftcore.errors import CheckpointError, PeftError
from peftcore.files import CONFIG_NAME, WEIGHTS_NAME, directory_written_atomically, hub

PICKLE = "adapter_model.bin"


def convert_bin(
    source: str | Path, directory: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """Write an adapter directory with safetensors from one with a pickle.

    Args:
        source: A directory or a hub id with `adapter_config.json` and `adapter_model.bin`.
        directory: The new directory.
        subfolder: Folder of the adapter inside of `source`.
        revision: Revision of the hub's repository.

    Returns:
        The new directory.

    Raises:
        CheckpointError: A file is absent, the pickle holds more than tensors, or `directory` exists.
    """
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    target = Path(directory)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new directory")
    if hub.further_file(source, PICKLE, **options) is None:
        raise CheckpointError(f"{source} holds no {PICKLE} to convert; check the name and --subfolder")
    folder = hub.adapter_directory(source, needs_weights=False, **options)
    tensors = _read(folder / PICKLE)
    with directory_written_atomically(target) as new:
        shutil.copy(folder / CONFIG_NAME, new / CONFIG_NAME)
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
    return target


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or holds more than tensors, so it is not read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors; ask its author for the adapter's state dict")
    # cloned, because safetensors refuses tensors that share memory
    return {str(key): value.detach().clone().contiguous() for key, value in content.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with status 1 and one line on an error."""
    parser = argparse.ArgumentParser(prog="python -m peftcore.storage.convert_bin", description=__doc__)
    parser.add_argument("source", help="a directory or a hub id")
    parser.add_argument("directory", help="the new directory", type=Path)
    parser.add_argument("--subfolder", help="folder of the adapter inside of the source")
    parser.add_argument("--revision", help="revision of the hub's repository")
    options = parser.parse_args(arguments)
    try:
        print(convert_bin(options.source, options.directory, options.subfolder, options.revision))
    except PeftError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
