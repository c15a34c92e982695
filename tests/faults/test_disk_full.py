"""A file system that is really full: what was there before stays whole, and the work goes on once there is room."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PEFTCORE, done
from stage_nursery import Nursery, said
from torch import nn

from flows.gate.promote import promote
from flows.paths import Paths
from flows.registry.registry import Registry
from flows.runtime.git import Git
from flows.runtime.stage import is_disk_full
from peftcore import LoraConfig, PeftModel, get_peft_model
from peftcore.files import damaged_files

ROW = "disk full"
SmallDisk = Callable[[Path, int], Path]


def fill(folder: Path, but: int = 0) -> Path:
    """Take all that is left of a file system but `but` bytes; returns what to remove again."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize) > but:
            try:
                file.write(bytes(free - but))
                file.flush()
            except OSError:
                break
    return filler


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "filler")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def adapted(value: float) -> PeftModel:
    model = get_peft_model(nn.Sequential(nn.Linear(256, 256)), LoraConfig(r=16, target_modules=["0"]))
    nn.init.constant_(lora_b(model), value)
    return model


def lora_b(model: nn.Module) -> torch.Tensor:
    return next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("left", [0, 4096, 16384])
def test_saving_an_adapter(small_disk: SmallDisk, tmp_path: Path, fault: Any, left: int) -> None:
    disk = small_disk(tmp_path / "disk", 2**18)
    folder = disk / "adapter"
    adapted(1.0).save_pretrained(folder)
    before = contents(folder)
    filler = fill(disk, left)
    with fault(ROW):
        with pytest.raises(Exception) as full:
            adapted(2.0).save_pretrained(folder)
        assert is_disk_full(full.value)
        assert contents(folder) == before and not damaged_files(folder)
        filler.unlink()
        adapted(2.0).save_pretrained(folder)
        loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(256, 256)), folder)
        assert bool((lora_b(loaded) == 2.0).all())


@pytest.mark.proof
def test_a_tag_of_the_registry(registered: Any, small_disk: SmallDisk, fault: Any) -> None:
    promote(registered.params, registered.paths)
    registered.register(loss=2.6, weight=2.0)
    tags = registered.git("tag", "--list")
    objects = registered.root / ".git"
    held = contents(objects)
    small_disk(objects, 2**22)
    for name, data in held.items():
        (objects / name).parent.mkdir(parents=True, exist_ok=True)
        (objects / name).write_bytes(data)
    filler = fill(objects)
    with fault(ROW):
        refused = done(registered.root, *PEFTCORE, "promote")
        assert refused.returncode == 1, refused.stderr
        assert "No space left on device" in refused.stderr and "Traceback" not in refused.stderr
        assert registered.git("tag", "--list") == tags
        assert Registry(Git(registered.root), "docstrings").stages()["champion"].version == "v0.1.0"
        filler.unlink()
        assert promote(registered.params, registered.paths).outcome == "promoted"


@pytest.mark.proof
@pytest.mark.parametrize("full", [".dvc/cache", ".dvc-remote"])
def test_dvcs_cache_and_its_remote(registered: Any, small_disk: SmallDisk, fault: Any, full: str) -> None:
    promote(registered.params, registered.paths)
    adapter = contents(registered.paths.adapter)
    disk = registered.root / full
    held = contents(disk)
    small_disk(disk, 2**20)
    for name, data in held.items():
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(data)
    source = registered.root / "source" / "adapter" / "README.md"
    source.write_bytes(os.urandom(2**17))  # a candidate that is larger than what is left
    filler = fill(disk, 2**16)
    stages = ["make", "register"]
    with fault(ROW):
        failed = [done(registered.root, *PEFTCORE, "stage", stage) for stage in stages]
        first = stages.index("make" if full == ".dvc/cache" else "register")
        assert failed[first].returncode == 1, [one.stderr for one in failed]
        assert "No space left on device" in "".join(one.stderr for one in failed)
        assert registered.git("tag", "--list").split() == ["docstrings#champion#1", "docstrings@v0.1.0"]
        filler.unlink()
        for stage in stages:
            again = done(registered.root, *PEFTCORE, "stage", stage)
            assert again.returncode == 0, again.stderr
        champion = Registry(Git(registered.root), "docstrings").stages()["champion"].commit
        got = done(registered.root, "dvc", "get", ".", "artifacts/adapter", "--rev", champion, "--out", "champion")
        assert got.returncode == 0 and contents(registered.root / "champion") == adapter


@pytest.mark.proof
@pytest.mark.parametrize("place", ["adapter", "checkpoints", "wandb"])
def test_training(
    nursery: Nursery, prepared: Paths, tiny_params: Any, small_disk: SmallDisk, fault: Any, place: str
) -> None:
    mode = "offline" if place == "wandb" else "disabled"
    prepared.params.write_text(tiny_params(tracking={"mode": mode}).model_dump_json())
    assert nursery.run(prepared.root, "train")[0] == 0, said(prepared.root)
    whole = contents(prepared.adapter)
    folder = prepared.adapter if place == "adapter" else prepared.root / place
    small_disk(folder, 2**20)
    for name, data in (whole if place == "adapter" else {}).items():
        (folder / name).write_bytes(data)
    filler = fill(folder, 0 if place == "wandb" else 4096)
    with fault(ROW):
        status, _ = nursery.run(prepared.root, "train")
        assert status == (0 if place == "wandb" else 1), said(prepared.root)
        assert contents(prepared.adapter) == whole
        # W&B's own logger shows its failed writes in its own way
        assert place == "wandb" or "Traceback" not in said(prepared.root)
        filler.unlink()
        assert nursery.run(prepared.root, "train")[0] == 0, said(prepared.root)
        assert contents(prepared.adapter) == whole, "it ends as a run that nothing befell"
