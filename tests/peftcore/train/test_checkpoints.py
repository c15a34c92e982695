import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftcore import TrainingError
from peftcore.files import write_manifest
from peftcore.train import checkpoints, fault_of_checkpoint, last_good_checkpoint
from peftcore.train.checkpoints import checkpoint_written, checkpoints_in, keep_latest, seal_checkpoint

WEIGHTS = "adapter_model.safetensors"


def fill(folder: Path, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    save_file({"lora_A": torch.full((2, 3), value)}, folder / WEIGHTS)
    write_manifest(folder)  # as save_pretrained does
    (folder / "trainer_state.json").write_text("{}")


def checkpoint(run: Path, step: int, seal: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    fill(folder)
    if seal:
        seal_checkpoint(folder)
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# -- which count -----------------------------------------------------------------------------------------------------


def test_the_latest_step_is_taken_not_the_latest_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    latest = checkpoint(tmp_path, 10)
    assert last_good_checkpoint(tmp_path) == latest
    assert fault_of_checkpoint(latest) is None


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "absent") is None


def flip(folder: Path) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def not_finite(folder: Path) -> None:
    save_file({"lora_A": torch.tensor([1.0, torch.nan])}, folder / WEIGHTS)
    write_manifest(folder)


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weights")
    write_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip, rf"these files are damaged: {WEIGHTS}"),
        (truncate, rf"these files are damaged: {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).unlink(), rf"these files are damaged: {WEIGHTS}"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "it is incomplete"),
        (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\xfe"), "its manifest is damaged"),
        (lambda folder: (folder / "SHA256SUMS").write_text("half a li"), "its manifest is damaged"),
        (empty, "it is incomplete"),
        (not_finite, rf"lora_A in {WEIGHTS} is not finite"),
        (garbage, rf"{WEIGHTS} cannot be read"),
    ],
)
@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], fault: str
) -> None:
    good = checkpoint(tmp_path, 10)
    damage(checkpoint(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        assert last_good_checkpoint(tmp_path) == good
    assert f"checkpoint-20 is skipped: {fault}" in caplog.text


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_checkpoint_that_was_never_sealed_is_passed_over(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, seal=False)
    assert last_good_checkpoint(tmp_path) == good


# -- writing ---------------------------------------------------------------------------------------------------------


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 10)
    with pytest.raises(KeyError), checkpoint_written(tmp_path / "checkpoint-20"):
        fill(tmp_path / "checkpoint-20")
        raise KeyError
    before = (good / WEIGHTS).read_bytes()
    with pytest.raises(KeyError), checkpoint_written(good):
        fill(good, 2.0)
        raise KeyError
    assert names(tmp_path) == ["checkpoint-10"]
    assert fault_of_checkpoint(good) is None and (good / WEIGHTS).read_bytes() == before


def test_one_that_is_written_anew_replaces_the_old_one_once_it_counts(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 10)
    old = (good / WEIGHTS).read_bytes()
    with checkpoint_written(good):
        fill(good, 2.0)
        killed = tmp_path / "killed"
        shutil.copytree(tmp_path, killed, ignore=lambda *_: {"killed"})  # what a kill at this moment would leave
    assert (good / WEIGHTS).read_bytes() != old and fault_of_checkpoint(good) is None
    assert (last_good_checkpoint(killed) or killed).name == "checkpoint-10"
    assert (killed / "checkpoint-10" / WEIGHTS).read_bytes() == old
    assert names(killed) == ["checkpoint-10"]


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 10)
    with pytest.raises(TrainingError, match=r"checkpoint-20 is deleted: lora_A .* is not finite"):  # noqa: SIM117
        with checkpoint_written(tmp_path / "checkpoint-20"):
            fill(tmp_path / "checkpoint-20", torch.inf)
    assert last_good_checkpoint(tmp_path) == good and names(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
    ],
)
def test_a_write_that_fails_says_what_is_intact_and_what_to_do(tmp_path: Path, error: Exception) -> None:
    checkpoint(tmp_path, 10)
    said = r"checkpoint-20 could not be written .*: checkpoint-10 is intact"
    with pytest.raises(TrainingError, match=said) as caught, checkpoint_written(tmp_path / "checkpoint-20"):
        fill(tmp_path / "checkpoint-20")
        raise error
    assert caught.value.__cause__ is error


def test_any_other_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), checkpoint_written(tmp_path / "checkpoint-1"):
        raise RuntimeError("a bug")


# -- how many stay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [5, 10, 15, 20, 30]),
        (3, None, [10, 15, 20]),  # 30 is of another course of the run
        (3, 5, [5, 15, 20]),
        (1, None, [20]),
        (1, 5, [5, 20]),
        (2, 20, [15, 20]),
        (9, None, [5, 10, 15, 20, 30]),
    ],
)
def test_the_current_and_the_best_stay_then_the_latest_before(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (5, 10, 15, 20, 30):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 17, seal=False)  # what a crash has left takes no place
    keep_latest(tmp_path / "checkpoint-20", limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert sorted(checkpoints.step_of(path) for path in checkpoints_in(tmp_path)) == left
