"""The calibrated base: the base in 4 or 8 bits, rounded on training rows and kept as a folder of its own.

bitsandbytes quantises a base to the same weights on each machine, so a run without calibration keeps the 16-bit base
alone. The rounding of a calibrated base follows from training rows, too, so the calibrated weights are kept: as an
output of the calibrate stage, a quantised transformers folder with a tokenizer, `calibration.json` and a manifest.
Without calibration that output holds the record alone.

The adapter's configuration names the calibrated base that the adapter was trained on, by its identity. Nothing here
imports torch.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.base.identity import base_identity
from flows.errors import BaseModelError
from flows.params import Quantization
from flows.paths import Paths
from peftcore.files import CONFIG_NAME

RECORD = "calibration.json"
"""File of a calibrated base's folder that says how it was made."""
_MARK = "#calibrated="
"""Separates the source of the base and the identity of the calibrated one in an adapter's configuration."""
STORED = ("storage", "double_quant", "compute_dtype")
"""Parameters of `quantization` that decide the format."""


def calibration_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the calibrated base in a folder; None if the folder holds none.

    Raises:
        BaseModelError: The record cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        calibrated = record["method"] != "none"
        if calibrated:
            recorded_quantization(record)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ValidationError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}); run `peftcore stage calibrate --force`") from error
    return record if calibrated else None


def recorded_quantization(record: dict[str, Any]) -> Quantization:
    """Return the storage of a calibrated base by its record."""
    values = {name: record["quantization"][name] for name in STORED}
    return Quantization.model_validate(values | {"calibration": {"method": record["method"]}})


def calibrated_identity(folder: Path) -> str | None:
    """Return the identity (SHA-256, hex) of the calibrated base in a folder; None if the folder holds none."""
    return None if calibration_record(folder) is None else base_identity(folder)


def trained_base(paths: Paths, quantization: Quantization) -> Path:
    """Return the folder of the base that adapters are trained on: the calibrated base, or the base as fetched.

    Raises:
        BaseModelError: The parameters ask for a calibrated base, and there is none, or that of another base.
    """
    if not quantization.is_calibrated:
        return paths.base
    check_calibration(paths.calibrated, quantization, paths.base)
    return paths.calibrated


def check_calibration(folder: Path, quantization: Quantization, base: Path | None = None) -> None:
    """Check that a folder holds a base with the calibration and the storage of `quantization`.

    Args:
        folder: The folder.
        quantization: The storage.
        base: Folder of the base as fetched that it has to be calibrated from; None: any.

    Raises:
        BaseModelError: The folder holds another base.
    """
    record = calibration_record(folder)
    if record is None and quantization.is_calibrated:
        raise BaseModelError(
            f"{folder} holds no calibrated base, and quantization.calibration.method is "
            f"{quantization.calibration.method}; run `peftcore stage calibrate`, or `dvc pull` it from the remote of "
            "the machine that did"
        )
    if record is None:
        return
    if not quantization.is_calibrated:
        raise BaseModelError(
            f"{folder} holds a calibrated base, and quantization.calibration.method is none; give the folder of the "
            f"base as fetched, or method {record['method']}"
        )
    stored = recorded_quantization(record)
    names = [name for name in STORED if getattr(quantization, name) not in ("auto", getattr(stored, name))]
    if names or record["method"] != quantization.calibration.method:
        listed = ", ".join(f"{name} {getattr(stored, name)}" for name in names) or record["method"]
        raise BaseModelError(
            f"{folder} was calibrated with {listed}, and the parameters have another value; run `peftcore stage "
            "calibrate`"
        )
    if base is not None and record["base_model"] != base_identity(base):
        raise BaseModelError(
            f"{folder} was calibrated from another base than that in {base}; run `peftcore stage calibrate`"
        )


def name_of_base(source: str, folder: Path) -> str:
    """Return the name of the base for an adapter's configuration.

    Args:
        source: `base.source`.
        folder: Folder of the base that the adapter is trained on.

    Returns:
        The source, followed by the identity of the calibrated base if the folder holds one.
    """
    identity = calibrated_identity(folder)
    return source if identity is None else f"{source}{_MARK}{identity}"


def check_adapter(adapter: Path, calibrated: str | None) -> None:
    """Check that an adapter was trained on a calibrated base, or on a base without calibration.

    Args:
        adapter: The adapter's directory; a configuration that cannot be read passes, because loading reports it.
        calibrated: Identity of the calibrated base; None: the base has no calibration.

    Raises:
        BaseModelError: The adapter was trained on another one.
    """
    expected = calibrated_base_of(adapter)
    if expected == calibrated:
        return
    if expected is None:
        raise BaseModelError(
            f"{adapter} was trained on a base without calibration, and this is the calibrated base "
            f"{_short(calibrated)}; give the base as fetched"
        )
    raise BaseModelError(
        f"{adapter} was trained on the calibrated base {_short(expected)}, and this base "
        f"{'has no calibration' if calibrated is None else f'is {_short(calibrated)}'}; give the folder "
        "artifacts/calibrated of the adapter's own run (`dvc get . artifacts/calibrated --rev TAG`)"
    )


def _short(identity: str | None) -> str:
    return (identity or "")[:12]


def calibrated_base_of(adapter: Path) -> str | None:
    """Return the identity of the calibrated base that an adapter's configuration names; None if it names none."""
    try:
        name = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
        _, mark, identity = str(name).partition(_MARK)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return identity if mark else None
