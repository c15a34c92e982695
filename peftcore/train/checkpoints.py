"""Training checkpoints that are whole or not there.

A checkpoint folder counts once its manifest is written, which is the last thing that happens to it, after every other
file has reached the disk. A folder that a crash left half written has no such manifest, a damaged one disagrees with
it; both are passed over for the one before. One that is written anew is kept aside until the new one counts.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from peftcore._util.tensors import PROMPT_STATE, WEIGHTS_NAME
from peftcore.config import CONFIG_NAME
from peftcore.errors import TrainingError
from peftcore.files import (
    MANIFEST,
    damaged_files,
    files_written_together,
    flush_to_disk,
    read_manifest,
    write_manifest,
)
from peftcore.storage.checkpoint import MODEL_CARD

log = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""What the trainer writes last; a manifest without it is that of the adapter alone."""

_ASIDE = ".replaced"
_FAILED_WRITER = "inline_container"
"""Where torch.save fails when a write does; it does not pass the system's error on."""


# -- which count -----------------------------------------------------------------------------------------------------


def fault_of_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be resumed from, or None if it can."""
    manifest = read_manifest(folder)
    if MANIFEST in manifest:  # it lists all but itself, unless it is none
        return "its manifest is damaged"
    if TRAINER_STATE not in manifest:
        return "it was never finished"
    damaged = damaged_files(folder)
    if damaged:
        return f"these files are damaged: {', '.join(damaged)}"
    return _fault_of_weights(folder)


def copy_adapters(checkpoint: Path, directory: Path) -> None:
    """Copy what a checkpoint holds of its adapters, and nothing of its training state, to where they are published."""
    for weights in checkpoint.rglob(WEIGHTS_NAME):
        to = directory / weights.parent.relative_to(checkpoint)
        with files_written_together(to, owned=[PROMPT_STATE]) as fresh:
            for name in (WEIGHTS_NAME, CONFIG_NAME, PROMPT_STATE, MODEL_CARD):
                if (weights.parent / name).exists():
                    shutil.copyfile(weights.parent / name, fresh / name)
            write_manifest(fresh, [file.name for file in fresh.iterdir() if file.name != MODEL_CARD])


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever has happened to its files since."""
    return TRAINER_STATE in read_manifest(folder)


def _fault_of_weights(folder: Path) -> str | None:
    for file in sorted(folder.rglob(WEIGHTS_NAME)):
        name = file.relative_to(folder)
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            return f"{name} cannot be read ({error})"
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{key} in {name} is not finite"
    return None


def checkpoints_in(run_directory: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, latest step first, whole or not."""
    return sorted(_folders(run_directory, ""), key=step_of, reverse=True)


def last_good_checkpoint(run_directory: Path) -> Path | None:
    """The latest whole checkpoint of a run; a faulty one before it is passed over with a warning.

    One that was being written anew when the run was killed is first put back as it was.
    """
    for aside in _folders(run_directory, _ASIDE):
        _put_back(aside)
    for path in checkpoints_in(run_directory):
        fault = fault_of_checkpoint(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path, fault)
    return None


def step_of(folder: Path) -> int:
    """The optimiser step after which a checkpoint was saved."""
    return int(folder.name.removesuffix(_ASIDE).removeprefix("checkpoint-"))


def _folders(run_directory: Path, suffix: str) -> list[Path]:
    pattern = rf"checkpoint-\d+{re.escape(suffix)}"
    entries = run_directory.iterdir() if run_directory.is_dir() else ()
    return [path for path in entries if re.fullmatch(pattern, path.name) and path.is_dir()]


# -- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_written(folder: Path) -> Iterator[None]:
    """Fill a checkpoint folder inside; afterwards it counts. On any failure what stood there before stands again.

    Raises TrainingError for a disk that is full or fails, and for weights that are not finite.
    """
    aside = folder.with_name(folder.name + _ASIDE)
    if folder.exists() and fault_of_checkpoint(folder) is None:
        folder.rename(aside)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with _failed_writes_explained(folder):
            yield
            seal_checkpoint(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _put_back(aside)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def seal_checkpoint(folder: Path) -> None:
    """Make a finished checkpoint folder count: flush all its files to the disk, then write their manifest.

    Raises TrainingError for weights that are not finite, with which no run can go on.
    """
    fault = _fault_of_weights(folder)
    if fault is not None:
        raise TrainingError(f"{folder.name} is not kept: {fault}; lower the learning rate or clip gradients")
    for path in sorted(folder.rglob("*")):
        flush_to_disk(path)
    write_manifest(folder)
    flush_to_disk(folder.parent)


def keep_latest(current: Path, limit: int | None, best: Path | None) -> None:
    """Delete what is beside the checkpoint just written: unfinished ones, and whole ones beyond the limit.

    limit: how many may stay, the current and the best always among them; None means all. Those before the current one
    stay before those of later steps, which another course of the run has left.
    """
    others = [path for path in checkpoints_in(current.parent) if path != current]
    for path in others:
        if not is_finished(path):
            shutil.rmtree(path, ignore_errors=True)
    if limit is None or limit <= 0:
        return
    kept = {current.resolve()} | ({best.resolve()} if best is not None else set())
    spare = [path for path in others if path.resolve() not in kept and path.exists()]
    spare.sort(key=lambda path: (step_of(path) < step_of(current), step_of(path)), reverse=True)
    for path in spare[max(0, limit - len(kept)) :]:
        shutil.rmtree(path, ignore_errors=True)


def _put_back(aside: Path) -> None:
    folder = aside.with_name(aside.name.removesuffix(_ASIDE))
    if not aside.exists():
        return
    if folder.exists() and fault_of_checkpoint(folder) is None:
        shutil.rmtree(aside, ignore_errors=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


@contextlib.contextmanager
def _failed_writes_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _FAILED_WRITER not in str(error):
            raise
        free = shutil.disk_usage(folder.parent).free / 2**20
        before = next((path.name for path in checkpoints_in(folder.parent) if path != folder), None)
        kept = f"{before} is intact" if before else "there is none before it"
        raise TrainingError(
            f"{folder.name} could not be written to {folder.parent} ({error}; {free:,.0f} MiB are free there); "
            f"make room, then resume: {kept}"
        ) from error
