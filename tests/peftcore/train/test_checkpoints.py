import logging
from pathlib import Path

import pytest

from peftcore.files import write_manifest
from peftcore.train import fault_of_checkpoint, last_good_checkpoint
from peftcore.train.checkpoints import seal_checkpoint


def checkpoint(run: Path, step: int, seal: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    write_manifest(folder)  # as save_pretrained does
    (folder / "trainer_state.json").write_text("{}")
    if seal:
        seal_checkpoint(folder)
    return folder


def test_the_latest_step_is_taken_not_the_latest_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    latest = checkpoint(tmp_path, 10)
    assert last_good_checkpoint(tmp_path) == latest
    assert fault_of_checkpoint(latest) is None


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "absent") is None


def test_a_checkpoint_that_was_never_sealed_is_passed_over(tmp_path: Path, caplog) -> None:
    good = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, seal=False)
    with caplog.at_level(logging.WARNING):
        assert last_good_checkpoint(tmp_path) == good
    assert "checkpoint-20" in caplog.text and "never finished" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_its_file_named(tmp_path: Path, caplog, damage: str) -> None:
    good = checkpoint(tmp_path, 10)
    file = checkpoint(tmp_path, 20) / "adapter_model.safetensors"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"Weights" if damage == "flip" else b"weigh")
    with caplog.at_level(logging.WARNING):
        assert last_good_checkpoint(tmp_path) == good
    assert "adapter_model.safetensors" in caplog.text
