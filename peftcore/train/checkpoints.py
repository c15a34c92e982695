"""Complete training checkpoints.

A checkpoint is complete once its manifest is written, after all other files have reached the disk. A folder that a
crash left incomplete has no manifest, and a damaged file disagrees with its manifest; resuming skips both. If a
checkpoint is written again, the earlier one is kept until the new one is complete.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

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
from peftcore.files.tensors import PROMPT_STATE, WEIGHTS_NAME
from peftcore.storage.checkpoint import MODEL_CARD

log = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""File that Trainer writes last. A manifest without this file belongs to an adapter, not to a checkpoint."""

_ASIDE = ".replaced"
_FAILED_WRITER = "inline_container"
"""File name in the error that torch.save raises if a write fails; the system's error is lost."""


# -- reading ---------------------------------------------------------------------------------------------------------


def fault_of_checkpoint(folder: Path) -> str | None:
    """Return the reason why a run cannot resume from a checkpoint folder, or None if it can."""
    manifest = read_manifest(folder)
    if MANIFEST in manifest:  # the manifest lists every file but itself
        return "its manifest is damaged"
    if TRAINER_STATE not in manifest:
        return "it is incomplete"
    damaged = damaged_files(folder)
    if damaged:
        return f"these files are damaged: {', '.join(damaged)}"
    return _fault_of_weights(folder)


def copy_adapters(checkpoint: Path, directory: Path) -> None:
    """Copy the adapters of a checkpoint to the directory that is published, without the training state."""
    for weights in checkpoint.rglob(WEIGHTS_NAME):
        to = directory / weights.parent.relative_to(checkpoint)
        with files_written_together(to, owned=[PROMPT_STATE]) as fresh:
            for name in (WEIGHTS_NAME, CONFIG_NAME, PROMPT_STATE, MODEL_CARD):
                if (weights.parent / name).exists():
                    shutil.copyfile(weights.parent / name, fresh / name)
            write_manifest(fresh, [file.name for file in fresh.iterdir() if file.name != MODEL_CARD])


def is_finished(folder: Path) -> bool:
    """Return True if a checkpoint was written completely, even if its files were damaged later."""
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
    """Return the folders `checkpoint-STEP` of a run, latest step first, complete or not."""
    return sorted(_folders(run_directory, ""), key=step_of, reverse=True)


def last_good_checkpoint(run_directory: Path) -> Path | None:
    """Return the latest complete checkpoint of a run, or None; warn of each incomplete or damaged one that is skipped.

    If the run was killed while it wrote a checkpoint again, the earlier checkpoint is restored first.
    """
    for aside in _folders(run_directory, _ASIDE):
        _put_back(aside)
    for path in checkpoints_in(run_directory):
        fault = fault_of_checkpoint(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is skipped: %s", path, fault)
    return None


def step_of(folder: Path) -> int:
    """Return the optimiser step after which a checkpoint was saved."""
    return int(folder.name.removesuffix(_ASIDE).removeprefix("checkpoint-"))


def _folders(run_directory: Path, suffix: str) -> list[Path]:
    pattern = rf"checkpoint-\d+{re.escape(suffix)}"
    entries = run_directory.iterdir() if run_directory.is_dir() else ()
    return [path for path in entries if re.fullmatch(pattern, path.name) and path.is_dir()]


# -- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_written(folder: Path) -> Iterator[None]:
    """Write a checkpoint folder inside, and seal the folder on exit. After an error, the earlier folder is restored.

    Raises:
        TrainingError: A write failed (the disk may be full), or weights are not finite.
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
    """Flush all files of a checkpoint folder to the disk, then write their manifest.

    Raises:
        TrainingError: Weights are not finite; no run can resume from them.
    """
    fault = _fault_of_weights(folder)
    if fault is not None:
        raise TrainingError(f"{folder.name} is deleted: {fault}; lower the learning rate or clip gradients")
    for path in sorted(folder.rglob("*")):
        flush_to_disk(path)
    write_manifest(folder)
    flush_to_disk(folder.parent)


def keep_latest(current: Path, limit: int | None, best: Path | None) -> None:
    """Delete incomplete checkpoints, and complete ones beyond the limit.

    Checkpoints of later steps come from an earlier course of the run, and are deleted first.

    Args:
        current: The checkpoint just written; never deleted.
        limit: Checkpoints to keep (count), the current and the best one among them. None: all.
        best: The best checkpoint; never deleted.
    """
    others = [path for path in checkpoints_in(current.parent) if path != current]
    for path in others:
        if not is_finished(path):
            shutil.rmtree(path, ignore_errors=True)
    if limit is None or limit <= 0:
        return
    protected = {current.resolve()} | ({best.resolve()} if best is not None else set())
    spare = [path for path in others if path.resolve() not in protected and path.exists()]
    spare.sort(key=lambda path: (step_of(path) < step_of(current), step_of(path)), reverse=True)
    for path in spare[max(0, limit - len(protected)) :]:
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
        earlier = f"{before} is intact" if before else "there is no earlier checkpoint"
        raise TrainingError(
            f"{folder.name} could not be written to {folder.parent} ({error}; {free:,.0f} MiB are free there); "
            f"free disk space, then resume: {earlier}"
        ) from error
