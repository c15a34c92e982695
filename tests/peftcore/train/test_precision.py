import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import trained
from tiny_training import adapted, records, trainer
from torch import Tensor, nn
from transformers import TrainerCallback

from peftcore import TrainingError
from peftcore.train.precision import computes_in_float16

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
FIRST_SCALE = 65536.0


class _OverflowAt(TrainerCallback):
    """Makes one gradient infinite at the end of a step's backward pass, as an overflow does."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.parameter = next(p for p in model.parameters() if p.requires_grad)
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            handle = self.parameter.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, torch.inf))[1])


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_adapters_of_a_float16_base_are_float32(method: str) -> None:
    model = adapted(method, dtype=torch.float16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}
    assert computes_in_float16(model) and not computes_in_float16(adapted(method, dtype=torch.bfloat16))


def test_a_float16_base_trains_as_in_float32(tmp_path: Path) -> None:
    runs = {}
    for dtype in (torch.float32, torch.float16):
        made = trainer(adapted(dtype=dtype), tmp_path / str(dtype), max_steps=6)
        made.train()
        runs[dtype] = records(made)
    for plain, half in zip(*runs.values(), strict=True):
        assert half["loss"] == pytest.approx(plain["loss"], rel=3e-3)
        assert half["grad_norm"] == pytest.approx(plain["grad_norm"], rel=3e-2)
    assert all("loss_scale" not in record for record in runs[torch.float32])
    assert {record["loss_scale"] for record in runs[torch.float16]} == {FIRST_SCALE}


def test_gradients_too_small_for_float16_are_learned_from(tmp_path: Path) -> None:
    norms: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("scaled", torch.float16), ("not scaled", torch.float16)):
        made = trainer(adapted(dtype=dtype, init_lora_weights=False), tmp_path / name, max_steps=1)
        real = made.compute_loss
        # so that activations get gradients about float16's smallest number
        made.compute_loss = lambda *given, real=real, **named: real(*given, **named) * 2**-20
        if name == "not scaled":
            made.accelerator.scaler = None
        made.train()
        norms[name] = records(made)[0]["grad_norm"]
    assert norms["scaled"] == pytest.approx(norms["float32"], rel=0.02)
    assert norms["not scaled"] < 0.9 * norms["float32"]


@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_an_overflow_skips_the_step_halves_the_scale_and_says_so(
    tmp_path: Path, clipped: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(dtype=torch.float16)
    seen: dict[int, dict[str, Tensor]] = {}

    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = trained(model)

    options = {"max_grad_norm": clipped, "callbacks": [_OverflowAt(model, 3), Record()], "lr_scheduler_type": "linear"}
    made = trainer(model, tmp_path, max_steps=4, **options)
    with caplog.at_level(logging.WARNING):
        made.train()
    for name, tensor in seen[2].items():
        assert torch.equal(tensor, seen[3][name]) and not torch.equal(tensor, seen[4][name])
    found = records(made)
    assert [record["loss_scale"] for record in found] == [FIRST_SCALE] * 2 + [FIRST_SCALE / 2] * 2
    assert [record.get("skipped_steps", 0) for record in found] == [0, 0, 1, 0]
    assert found[2]["learning_rate"] == found[3]["learning_rate"]  # the schedule waited
    assert "step 3: gradients overflowed" in caplog.text and "loss scale is now 32768" in caplog.text


def test_a_skipped_step_does_not_reach_the_allocator(tmp_path: Path) -> None:
    model = adapted("adalora", dtype=torch.float16)
    steps: list[int] = []
    real = model.on_optimizer_step
    model.on_optimizer_step = lambda step, optimizer: (steps.append(step), real(step, optimizer))
    trainer(model, tmp_path, max_steps=5, callbacks=[_OverflowAt(model, 2)]).train()
    assert steps == [1, 3, 4, 5]


def test_the_allocator_reads_gradients_of_the_loss_not_of_the_scaled_one(tmp_path: Path) -> None:
    norms = {}
    for dtype in (torch.float32, torch.float16):
        model: Any = adapted("adalora", dtype=dtype)
        torch.manual_seed(0)
        for path, parameter in model.named_parameters():
            if "lora_E" in path:  # with zeros A and B have no gradients
                torch.nn.init.normal_(parameter)

        def measure(step: int, optimizer: Any, model: Any = model, dtype: Any = dtype) -> None:
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            norms[dtype] = torch.nn.utils.get_total_norm(grads).item()

        model.on_optimizer_step = measure
        trainer(model, tmp_path / str(dtype), max_steps=1, max_grad_norm=0.0).train()  # nothing unscales for clipping
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=2e-2)


def test_the_scale_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float16)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    straight = trainer(model, tmp_path, max_steps=6, callbacks=[_OverflowAt(model, 2)], **options)
    straight.train()
    resumed = trainer(adapted(dtype=torch.float16), tmp_path, max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.accelerator.scaler.state_dict() == straight.accelerator.scaler.state_dict()
    assert resumed.accelerator.scaler.get_scale() == FIRST_SCALE / 2
    assert [r["loss"] for r in records(resumed)] == [r["loss"] for r in records(straight)]
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name])


def test_the_scale_doubles_after_steps_without_an_overflow(tmp_path: Path) -> None:
    made = trainer(adapted(dtype=torch.float16), tmp_path, max_steps=3)
    made.accelerator.scaler.set_growth_interval(2)
    made.train()
    assert [r["loss_scale"] for r in records(made)] == [FIRST_SCALE, 2 * FIRST_SCALE, 2 * FIRST_SCALE]


def test_float16_for_a_base_that_is_not_in_it_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"fp16=True has no effect on cpu .* load the base in float16"):
        trainer(adapted(), tmp_path, fp16=True)
    assert trainer(adapted(dtype=torch.float16), tmp_path, fp16=True).accelerator.scaler is not None


def test_a_parameter_that_trains_in_float16_is_refused(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float16, modules_to_save=["lm_head"])
    with pytest.raises(TrainingError, match=r"lm_head\S* is trained in float16"):
        trainer(model, tmp_path)
