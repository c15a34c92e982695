"""The tensors of an adapter: read from its directory with every check that needs no model, and whole or in shards."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
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
_TRAINER_ARGUMENTS = "training_args.bin"
"""A pickle that Trainer puts beside whatever it saves; it is never opened here."""


def read_tensors(directory: Path, check_manifest: bool = True) -> dict[str, Tensor]:
    """The tensors of an adapter directory, on the CPU.

    check_manifest: hash the files, as whoever reads a directory for the first time should.
    Raises CheckpointError for a missing, truncated or altered file, and before reading anything for pickles.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no adapter directory {directory}; give the one that save_pretrained wrote")
    # a Trainer's checkpoint holds its optimiser as pickles; they are never opened here
    foreign = [f.name for f in directory.iterdir() if f.suffix in PICKLES and f.name != _TRAINER_ARGUMENTS]
    foreign = [] if (directory / _TRAINER_STATE).exists() else foreign
    foreign += ["adapter_model.bin"] if (directory / "adapter_model.bin").exists() else []
    if foreign:
        raise CheckpointError(
            f"{directory} holds {', '.join(sorted(set(foreign)))}: a pickle can run code when it is read; "
            "convert it to safetensors where you trust it, and remove it here"
        )
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"no {WEIGHTS_NAME} in {directory}; the adapter was not saved whole")
    if check_manifest and (damaged := damaged_files(directory)):
        raise CheckpointError(f"{directory}: {', '.join(damaged)} is not what {MANIFEST} says; take another copy")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); take another copy") from error


# -- shards ------------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each process may hold a part."""
    return hasattr(tensor, "full_tensor")  # no import of torch.distributed.tensor where nothing is distributed


def whole(tensor: Tensor) -> Tensor:
    """A DTensor put together from all processes' parts, which all have to ask; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def writing_shards(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Context in which a whole tensor can be copied into each of these, sharded or not."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
