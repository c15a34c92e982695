"""The folder of a run's own files, which outlives a temporary working tree."""

from pathlib import Path


def lasting_folder(directory: Path) -> Path:
    """Return the repository's folder for one below .dvc/tmp/exps or .dvc/tmp/retraining, which is deleted later."""
    for parent in directory.resolve().parents:
        if parent.parts[-3:] in ((".dvc", "tmp", "exps"), (".dvc", "tmp", "retraining")):
            return parent.parents[2]
    return directory
