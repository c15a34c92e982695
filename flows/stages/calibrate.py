"""calibrate: the quantised base, rounded on training rows (`quantization.calibration`), or nothing.

Training that continues from a registered version keeps that version's calibrated base, because the adapter was trained
on it.
"""

import json
import logging
import shutil
from pathlib import Path

from flows.base.calibrated import RECORD, check_calibration
from flows.errors import StageError
from flows.params import Params
from flows.paths import Paths
from flows.runtime.stage import start
from peftcore.files import directory_written_atomically, write_manifest

logger = logging.getLogger("flows.calibrate")  # as a program this module is called __main__


def run(params: Params, paths: Paths) -> None:
    """Write `paths.calibrated`; on an error the folder of an earlier run stays.

    Raises:
        StageError: The rows are too few, or the version to start from had no calibration.
        BaseModelError: The base is damaged, or another one than that of the version to start from.
        ConfigError: The base's values on the rows are not finite.
    """
    _check_start(params, paths)
    if not params.quantization.is_calibrated:
        with directory_written_atomically(paths.calibrated) as folder:
            _write_record(folder, {"method": "none"})
        return
    if paths.start_calibrated.is_dir():
        check_calibration(paths.start_calibrated, params.quantization, paths.base)
        with directory_written_atomically(paths.calibrated) as folder:
            shutil.copytree(paths.start_calibrated, folder, dirs_exist_ok=True)
        logger.info("kept the calibrated base of the version that training continues from")
    else:
        from flows.training.calibration import save_calibrated_base  # imports torch, which a run without does not need

        with directory_written_atomically(paths.calibrated) as folder:
            _write_record(folder, save_calibrated_base(params, paths, folder))
            write_manifest(folder)


def _check_start(params: Params, paths: Paths) -> None:
    """Raise StageError if the version to start from was trained with calibration and the parameters ask for none."""
    source = (
        json.loads(paths.start_source.read_text(encoding="utf-8")) if paths.start_source.exists() else {"version": None}
    )
    if (version := source["version"]) is None:
        return
    there, here = paths.start_calibrated.is_dir(), params.quantization.is_calibrated
    if there != here:
        raise StageError(
            f"train.start_from: {version} was trained {'on a calibrated base' if there else 'without calibration'}, "
            f"and quantization.calibration.method is {params.quantization.calibration.method}; give method "
            f"{'rounding' if there else 'none'}, or start anew with start_from: null"
        )


def _write_record(folder: Path, record: dict[str, object]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start(run)
