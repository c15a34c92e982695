"""Training with a teacher in the pipeline: a registered version, another model, or the base."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flows.base.model import load_dequantized, load_for_training
from flows.params import Params
from flows.paths import Paths
from flows.stages import train
from flows.training.teacher import load_teacher
from peftcore import PeftModel

IDS = torch.tensor([[3, 7, 9, 4]])


def records(paths: Paths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.training_log.read_text().splitlines()]


def with_teacher(paths: Paths) -> Paths:
    """The paths, with the trained adapter as that of the teacher v0.3.0."""
    shutil.copytree(paths.adapter, paths.teacher_adapter)
    paths.teacher_source.write_text('{"version": "v0.3.0"}')
    return paths


@pytest.mark.parametrize("init", [{}, {"init_lora_weights": "pissa"}])
@torch.no_grad()
def test_a_version_lies_on_the_weights_of_the_base(
    trained: Paths, tiny_params: Callable[..., Params], init: dict[str, Any]
) -> None:
    params = tiny_params(train={"distillation": {"teacher": "v0.3.0"}}, method={"options": init})
    base = load_for_training(trained.base, params.quantization, 32)
    teacher: Any = load_teacher(params, with_teacher(trained), base, 32)
    expected = PeftModel.from_pretrained(load_dequantized(trained.base, params.quantization), trained.adapter).eval()
    logits = teacher.eval()(IDS).logits
    assert (logits - expected(IDS).logits).abs().max() < 0.05
    with teacher.disable_adapter():
        assert (logits - teacher(IDS).logits).abs().max() > 0.5
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in base.parameters()}
    assert bool(shared) is not bool(init)


@pytest.mark.slow
def test_a_version_keeps_the_next_one_near(trained: Paths, tiny_params: Callable[..., Params]) -> None:
    with_teacher(trained)
    last = {}
    for weight in (0.001, 100.0):  # at the teacher's own rate, the same rows would give the same adapter
        options = {"learning_rate": 0.03, "distillation": {"teacher": "v0.3.0", "weight": weight}}
        train.run(tiny_params(train=options), trained)
        last[weight] = [one["divergence"] for one in records(trained) if one["validation_loss"] is not None][-1]
    assert last[100.0] < last[0.001] / 2
    saved = {path.name for path in trained.adapter.iterdir()}
    assert "adapter_model.safetensors" in saved and not any((trained.adapter / name).is_dir() for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_a_run_with_a_teacher_goes_on_exactly(
    trained: Paths, tiny_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    with_teacher(trained)
    params = tiny_params(train={"distillation": {"teacher": "v0.3.0"}, "batching": batching})
    train.run(params, trained)
    straight = (trained.adapter / "adapter_model.safetensors").read_bytes()
    assert all(one["divergence"] is not None for one in records(trained))
    last_step = json.loads(trained.training_summary.read_text())["steps"] - 1
    from flows.training.callbacks import WriteLog

    begin = WriteLog.on_step_begin

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == last_step:
            raise RuntimeError("killed")
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(WriteLog, "on_step_begin", die)
        with pytest.raises(RuntimeError, match="killed"):
            train.run(params, trained)
    train.run(params, trained)
    assert (trained.adapter / "adapter_model.safetensors").read_bytes() == straight


@pytest.mark.slow
def test_the_base_is_a_teacher_without_a_second_model(prepared: Paths, tiny_params: Callable[..., Params]) -> None:
    train.run(tiny_params(train={"distillation": {"teacher": "base"}}), prepared)
    first, *_, last = records(prepared)
    assert first["divergence"] == pytest.approx(0, abs=1e-3) and last["divergence"] > first["divergence"]
