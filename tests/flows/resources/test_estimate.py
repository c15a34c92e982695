"""Estimates of memory, time and disk, and the command `peftcore plan`."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from resource_cases import GIB, llama_7b, params
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import BaseModelError, EstimateError
from flows.paths import Paths
from flows.resources import estimate as estimate_module
from flows.resources import static_memory
from flows.resources.activations import Activations
from flows.resources.batches import workload
from flows.resources.estimate import _base_folder, estimate
from flows.resources.probe import Measured
from flows.resources.sizes import with_blocks
from flows.stages.detect import without_weights


@pytest.fixture
def without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the simulated training step and the alternatives, for tests of what does not depend on them."""
    monkeypatch.setattr(static_memory, "activations", lambda *_: Activations(kept=0, working=0, loss=0))
    monkeypatch.setattr(static_memory, "evaluation_bytes", lambda *_: 0)
    monkeypatch.setattr(estimate_module, "alternatives", lambda *_: [])


def test_without_the_probe_it_adds_up_and_says_so(paths: Paths) -> None:
    found = estimate(params(), paths)
    assert found.peak == max(sum(found.memory.values()), found.loading_peak)
    assert (found.time, found.fits) == ({}, True)
    assert "without the probe" in found.notes[-1]
    checkpointing = [change.peak for change in found.changes if "train.gradient_checkpointing" in change.params]
    assert checkpointing == sorted(checkpointing, reverse=True)
    assert found.disk["base"] == 0  # it is there
    assert found.mapped == 2 * 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64)  # keys and values have half the heads
    assert replace(found, limit=found.peak - found.mapped).fits  # the system drops a mapped file when it must
    assert not replace(found, limit=found.peak - found.mapped - 1).fits
    assert found.disk["merged model"] == sum(2 * p.numel() for p in without_weights(paths.base).parameters())


def test_with_the_probe_it_has_time_and_what_libraries_take(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [(64, 0.5), (128, 1.0)]
    monkeypatch.setattr(estimate_module, "alternatives", lambda *_: [])
    monkeypatch.setattr(estimate_module, "peak_memory", lambda device: GIB // 4)
    figures = Measured(GIB // 2, GIB, GIB // 8, 2.0, 1.0, timings, timings, 0.25, 0.5)
    probe: Any = SimpleNamespace(measure=lambda tasks, timeout: [figures])
    found = estimate(params(), paths, probe=probe)
    assert found.peak == GIB + GIB // 8 == sum(found.memory.values())
    assert (found.time["libraries"], found.time["loading the base"]) == (2.0, 1.0)
    assert (found.time["optimiser"], found.time["checkpoints"]) == (3 * 0.25, 3 * 0.5)  # a run of three steps
    passes = [one.tokens / 128 for one in workload(params(), paths).training]
    assert found.time["forward and backward"] == pytest.approx(sum(passes))
    assert found.seconds == pytest.approx(sum(found.time.values()))


@pytest.mark.slow
def test_a_model_that_is_not_here_and_will_not_fit(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "memory_limit", lambda device: 3 * GIB)
    monkeypatch.setattr(estimate_module, "peak_memory", lambda device: GIB // 2)
    with_blocks(llama_7b(), 4).save_pretrained(tmp_path / "big")
    monkeypatch.chdir(in_a_project(paths))
    long = {"input_ids": [[5] * 512] * 16, "labels": [[5] * 512] * 16}
    parquet.write_table(pyarrow.table(long), paths.split("train"))
    result = peftcore("plan", "--config", str(tmp_path / "big" / "config.json"), "--no-probe", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["fits"], found["blocks"]) == (1, False, 4)
    assert result.stderr.startswith("error: training needs ")
    assert "this machine has 3.0 GiB; it fits with " in result.stderr
    assert "train.gradient_checkpointing: blocks" in result.stderr


@pytest.mark.slow
def test_the_command_prints_tables(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(in_a_project(paths))
    result = peftcore("plan", "--no-probe")
    assert result.exit_code == 0
    for said in ("LlamaForCausalLM, 2 blocks", "base weights, quantised", "merged model", "train.batch_size: 4"):
        assert said in result.stdout


def test_a_time_limit_without_a_probe_is_a_usage_error() -> None:
    result = peftcore("plan", "--no-probe", "--probe-timeout", "5")
    assert result.exit_code == 2 and "with --no-probe there is no probe to limit" in result.stderr


def in_a_project(paths: Paths) -> Path:
    (paths.root / "dvc.yaml").write_text("stages: {}\n")
    (paths.root / ".dvc").mkdir()
    return paths.root


def peftcore(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.mark.usefixtures("without_a_step")
def test_a_full_disk_is_foreseen(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1024}))
    found = estimate(params(), paths)
    assert not found.fits
    assert "of disk, and 0 MiB are free" in found.refusal()


@pytest.mark.usefixtures("without_a_step")
def test_every_copy_of_the_outputs_takes_disk(paths: Paths) -> None:
    calibrated = params(quantization={"calibration": {"method": "rounding"}})
    disk = estimate(calibrated, paths).disk
    made = disk["adapter"] + disk["merged model"] + disk["calibrated base"]
    base = disk["merged model"]  # of the same weights, and here already
    assert 0 < disk["calibrated base"] < base
    assert (disk["DVC's cache"], disk["DVC's remote"]) == (made, made + base)
    paths.version.write_text("{}\n")
    assert estimate(calibrated, paths).disk["DVC's remote"] == made  # the remote has the base of an earlier version
    (paths.root / ".dvc").mkdir()
    (paths.root / ".dvc" / "config").write_text("['remote \"local\"']\n    url = s3://bucket/versions\n")
    assert estimate(calibrated, paths).disk["DVC's remote"] == 0


@pytest.mark.usefixtures("without_a_step")
def test_a_merged_model_has_the_size_of_what_it_is_merged_into(paths: Paths) -> None:
    weights = sum(p.numel() for p in without_weights(paths.base).parameters())
    for dtype, width in (("auto", 2), ("float32", 4)):  # auto: 16 bits on each machine
        disk = estimate(params(quantization={"compute_dtype": dtype}), paths).disk
        assert disk["merged model"] == width * weights
    assert estimate(params(merge={"into": "requantized"}), paths).disk["merged model"] < 2 * weights


@pytest.mark.usefixtures("without_a_step")
def test_a_base_that_a_path_names_is_still_written_by_the_fetch_stage(paths: Paths) -> None:
    paths.base.rename(paths.root / "source")
    disk = estimate(params(base={"source": "path:source"}), paths).disk
    assert disk["base"] == disk["merged model"] > 0


@pytest.mark.usefixtures("without_a_step")
def test_processes_share_the_memory_of_a_cpu(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(estimate_module, "peak_memory", lambda device: GIB)
    monkeypatch.setattr(estimate_module, "memory_limit", lambda device: 3 * GIB)
    assert estimate(params(), paths).fits
    found = estimate(params(train={"processes": 4}), paths)
    assert (found.limit, found.fits) == (3 * GIB // 4, False)
    assert "and each of 4 processes on this machine has 768 MiB" in found.refusal()
    assert any(note.startswith("train.processes is 4: memory is that of one process") for note in found.notes)


def test_a_base_that_a_path_names_needs_no_fetch(paths: Paths) -> None:
    new, there = Paths(paths.root / "elsewhere"), params(base={"source": f"path:{paths.base}"})
    assert _base_folder(there, new) == paths.base and _base_folder(there, paths) == paths.base
    assert _base_folder(params(base={"source": "path:nowhere"}), new) == new.base  # whose absence is an error


def test_what_cannot_be_planned_is_refused(paths: Paths) -> None:
    with pytest.raises(EstimateError, match="objective is dpo; only sft"):
        estimate(params(data={"kind": "preference", "source": "rows.jsonl"}, train={"objective": "dpo"}), paths)
    with pytest.raises(EstimateError, match=r"teacher is base, whose forward passes are not estimated"):
        estimate(params(train={"distillation": {"teacher": "base"}}), paths)
    with pytest.raises(EstimateError, match=r"storage is gguf.*estimate with storage int8"):
        estimate(params(quantization={"storage": "gguf"}), paths)
    with pytest.raises(EstimateError, match=r"method: .*no_such"):
        estimate(params(method={"target_modules": ["no_such"]}), paths)
    with pytest.raises(BaseModelError, match="run `peftcore stage fetch`, or give --config"):
        estimate(params(), Paths(paths.root / "elsewhere"))
