"""The tensors of an adapter directory, read with every check that needs no model."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peftcore.errors import CheckpointError
from peftcore.files import MANIFEST, damaged_files

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What stands before the path of a layer in every key."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_TRAINER_STATE = "trainer_state.json"


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, on the CPU.

    Raises CheckpointError for a missing, truncated or altered file, and before reading anything for pickles.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no adapter directory {directory}; give the one that save_pretrained wrote")
    # a Trainer's checkpoint holds its optimiser as pickles; they are never opened here
    foreign = [f.name for f in directory.iterdir() if f.suffix in PICKLES and not (directory / _TRAINER_STATE).exists()]
    foreign += ["adapter_model.bin"] if (directory / "adapter_model.bin").exists() else []
    if foreign:
        raise CheckpointError(
            f"{directory} holds {', '.join(sorted(set(foreign)))}: a pickle can run code when it is read; "
            "convert it to safetensors where you trust it, and remove it here"
        )
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"no {WEIGHTS_NAME} in {directory}; the adapter was not saved whole")
    if damaged := damaged_files(directory):
        raise CheckpointError(f"{directory}: {', '.join(damaged)} is not what {MANIFEST} says; take another copy")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); take another copy") from error
