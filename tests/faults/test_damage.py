"""Damaged, foreign and hostile files: refused by name, and no code in them runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flows.errors import PipelineError, StageError
from flows.gate.promote import promote
from flows.paths import Paths
from flows.runtime.project import dvc
from flows.stages import evaluate, merge, register, train
from peftcore import LoraConfig, PeftError, PeftModel, get_peft_model
from peftcore.files import write_manifest
from peftcore.train import last_good_checkpoint

DAMAGED, PICKLED = "flipped bit, truncated file, NaN", "pickle or foreign files"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    _write(file, data)


def truncate(file: Path) -> None:
    _write(file, file.read_bytes()[: file.stat().st_size // 2])


def _write(file: Path, data: bytes | bytearray) -> None:
    file.unlink()  # it may be a link into DVC's cache
    file.write_bytes(data)


damages = pytest.mark.parametrize("damage", [flip, truncate])


@damages
def test_prepared_rows(prepared: Paths, tiny_params: Any, fault: Any, damage: Callable[[Path], None]) -> None:
    with fault(DAMAGED):
        damage(prepared.split("train"))
        with pytest.raises(StageError, match=r"train\.parquet changed after `peftcore doctor` checked it"):
            train.run(tiny_params(), prepared)
        assert not prepared.adapter.exists()


def test_test_rows_that_are_cut_short(prepared: Paths, tiny_params: Any, fault: Any) -> None:
    train.run(tiny_params(), prepared)
    truncate(prepared.split("test"))
    for stage in (evaluate, merge):
        with fault(DAMAGED), pytest.raises(StageError, match=r"test\.parquet"):
            stage.run(tiny_params(), prepared)


OUTS = ["adapter/adapter_model.safetensors", "evaluation/rows.parquet", "merge.json", "data/report.json"]


@pytest.mark.proof
def test_any_out_that_changed_since_its_stage_ran_is_not_registered(project: Any, fault: Any) -> None:
    for out in OUTS:
        file = project.paths.artifacts / out
        whole = file.read_bytes()
        with fault(DAMAGED):
            flip(file)
            with pytest.raises(PipelineError, match=f"artifacts/{out.split('/')[0]}"):
                register.run(project.params, project.paths)
            assert project.git("tag", "--list") == ""
        _write(file, whole)


def test_a_version_record(registered: Any, fault: Any) -> None:
    whole = registered.paths.version.read_bytes()
    for text, said in ((whole[:-9], "version.json is not valid JSON"), (whole.replace(b"0.1.0", b"0.1.1"), "v0.1.1")):
        with fault(DAMAGED):
            registered.paths.version.write_bytes(text)
            with pytest.raises(PipelineError, match=said):
                promote(registered.params, registered.paths)
            assert registered.git("tag", "--list").split() == ["docstrings@v0.1.0"]


@damages
def test_an_object_of_git(registered: Any, fault: Any, damage: Callable[[Path], None]) -> None:
    """A version's tag, its commit, the commit's folder and the record in it."""
    tag = "docstrings@v0.1.0"
    for thing in (f"refs/tags/{tag}", f"{tag}^{{commit}}", f"{tag}:registry", f"{tag}:registry/version.json"):
        name = registered.git("rev-parse", thing).strip()
        file = registered.root / ".git" / "objects" / name[:2] / name[2:]
        whole = file.read_bytes()
        with fault(DAMAGED):
            damage(file)
            with pytest.raises(PipelineError, match=rf"{name[:10]}|{tag}"):
                promote(registered.params, registered.paths)
            _write(file, whole)
            assert registered.git("tag", "--list").split() == [tag]


class Payload:
    """Its pickle makes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def payload(target: Path) -> bytes:
    return pickle.dumps(Payload(target), protocol=2)  # torch's own


def test_a_pickle_in_an_adapters_folder_never_runs(tmp_path: Path, fault: Any) -> None:
    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6))

    marker = tmp_path / "it ran"
    pickle.loads(payload(marker))
    assert marker.exists(), "this payload does run"
    marker.rmdir()
    saved = tmp_path / "adapter"
    get_peft_model(base(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(saved)
    for name in ("adapter_model.bin", "adapter_model.pt", "extra.pkl", "optimizer.pth", "adapter_model.safetensors"):
        with fault(PICKLED):
            folder = tmp_path / name.replace(".", "-")
            shutil.copytree(saved, folder)
            (folder / name).write_bytes(payload(marker))
            write_manifest(folder)  # whoever can write the one can write the other
            if name == "adapter_model.safetensors":
                with pytest.raises(PeftError, match=name):
                    PeftModel.from_pretrained(base(), folder)
            else:  # beside the adapter's own file it is not read, and the library says so
                with pytest.warns(UserWarning, match=rf"holds {name} beside .*so they are not read"):
                    PeftModel.from_pretrained(base(), folder)
            assert not marker.exists()


def test_a_pickle_in_a_checkpoint_never_runs(
    prepared: Paths, tiny_params: Any, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    class Interrupted(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Interrupted

    params = tiny_params()
    with monkeypatch.context() as patch:
        patch.setattr(train, "_summary", die)  # when all is trained, and no result written
        with pytest.raises(Interrupted):
            train.run(params, prepared)
    (run,) = prepared.checkpoints.iterdir()
    checkpoint = last_good_checkpoint(run)
    assert checkpoint is not None
    earlier = run / "checkpoint-6"
    shutil.rmtree(checkpoint)
    kept = prepared.root / "kept"
    shutil.copytree(run, kept)
    marker = prepared.root / "it ran"
    pickles = [file.name for file in earlier.iterdir() if file.suffix in (".pt", ".pth", ".bin")]
    assert {"optimizer.pt", "rng_state.pth", "run_state.pt", "scheduler.pt"} <= set(pickles)
    for name in pickles:
        with fault(PICKLED):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(kept, run)
            (earlier / name).write_bytes(payload(marker))
            write_manifest(earlier)
            if name == "training_args.bin":  # it is never opened
                train.run(params, prepared)
            else:
                with pytest.raises(pickle.UnpicklingError):
                    train.run(params, prepared)
            assert not marker.exists()


def test_foreign_files_are_refused_by_the_gate(registered: Any, fault: Any) -> None:
    adapter = registered.paths.adapter
    marker = registered.root / "it ran"

    def link() -> None:
        (adapter / "link").symlink_to("/etc/passwd")

    def folder() -> None:
        (adapter / "folder").mkdir()

    def pickled() -> None:
        (adapter / "weights.pkl").write_bytes(payload(marker))

    for add, name in ((link, "link"), (folder, "folder"), (pickled, "weights.pkl")):
        with fault(PICKLED):
            add()
            assert f"{name} may not be in an adapter folder" in promote(registered.params, registered.paths).sentence
            assert not marker.exists() and registered.git("tag", "--list").split() == ["docstrings@v0.1.0"]
        (adapter / name).rmdir() if name == "folder" else (adapter / name).unlink()


@pytest.mark.parametrize("damage", [flip, pytest.param(truncate, marks=pytest.mark.proof)])
def test_an_object_of_the_remote_is_found_out_when_it_is_pulled(
    registered: Any, fault: Any, damage: Callable[[Path], None]
) -> None:
    shutil.rmtree(registered.root / ".dvc" / "cache")
    shutil.rmtree(registered.paths.artifacts)
    lock = (registered.root / "dvc.lock").read_text()
    remote = registered.root / ".dvc-remote"
    objects = [one for one in remote.rglob("*") if one.is_file() and one.suffix != ".dir" and one.stat().st_size > 200]
    damaged = max(objects, key=lambda one: one.stat().st_size)
    with fault("corrupt remote object"):
        whole = damaged.read_bytes()
        damage(damaged)
        with pytest.raises(PipelineError, match="dvc pull"):
            dvc(registered.root, "pull")
        damaged.unlink(missing_ok=True)
        damaged.write_bytes(whole)
        dvc(registered.root, "pull")
        assert (registered.root / "dvc.lock").read_text() == lock
        assert json.loads(dvc(registered.root, "status", "--json", "make")) == {}
