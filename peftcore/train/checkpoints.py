"""Training checkpoints that are whole or not there.

A checkpoint folder counts once its manifest is written, which is the last thing that happens to it, after every other
file has reached the disk. A folder that a crash left half written has no such manifest, a damaged one disagrees with
it; both are passed over for the one before.
"""

import logging
import re
from pathlib import Path

from peftcore.files import damaged_files, flush_to_disk, read_manifest, write_manifest

log = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""What the trainer writes last; a manifest without it is that of the adapter alone."""


def seal_checkpoint(folder: Path) -> None:
    """Make a finished checkpoint folder count: flush all its files to the disk, then write their manifest."""
    for path in sorted(folder.rglob("*")):
        flush_to_disk(path)
    write_manifest(folder)
    flush_to_disk(folder.parent)


def fault_of_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be resumed from, or None if it can."""
    if TRAINER_STATE not in read_manifest(folder):
        return "it was never finished"
    damaged = damaged_files(folder)
    return f"these files are damaged: {', '.join(damaged)}" if damaged else None


def checkpoints_in(run_directory: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, latest step first, whole or not."""
    found = [
        (int(match[1]), path)
        for path in (run_directory.iterdir() if run_directory.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def last_good_checkpoint(run_directory: Path) -> Path | None:
    """The latest whole checkpoint of a run; a faulty one before it is passed over with a warning."""
    for path in checkpoints_in(run_directory):
        fault = fault_of_checkpoint(path)
        if fault is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path, fault)
    return None
