"""What becomes of a step whose loss cannot be right: training stops before it, or goes on from the last checkpoint."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from process_faults import BAD_STEP, bad_loss_in_one, out_of_memory_in_one
from process_groups import together
from quiet_training import trained
from tiny_training import adapted, records, trainer
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from transformers import TrainerCallback

from peftcore import TrainingError
from peftcore.train import FaultPolicy

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
ROLLBACK = FaultPolicy(on_bad_loss="rollback", spike_window=4)


def everything(made: Any) -> dict[str, Any]:
    """All that training changes, as one flat dictionary of copies."""
    model = made.model
    state: dict[str, Any] = {**trained(model), **{f"own/{k}": v.clone() for k, v in model.adapter_state().items()}}
    for number, held in made.optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{number}/{name}": torch.as_tensor(value).clone() for name, value in held.items()}
    state["lr"] = torch.tensor([group["lr"] for group in made.optimizer.param_groups])
    schedule = made.lr_scheduler.state_dict()
    state["schedule"] = torch.tensor([schedule["last_epoch"], *schedule["_last_lr"]])
    return state


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class Follow(TrainerCallback):
    """Keeps everything there is after each step, and spoils the loss of chosen steps' first micro-batch."""

    def __init__(self, spoilt: dict[int, Callable[[Tensor], Tensor]]) -> None:
        self.spoilt = spoilt
        self.after: dict[int, dict[str, Any]] = {}

    def watch(self, made: Any) -> Any:
        real, self.trainer, self.step, self.fresh = made.compute_loss, made, 0, False

        def compute_loss(*given: Any, **named: Any) -> Any:
            loss = real(*given, **named)
            spoils, self.fresh = self.fresh, False
            return self.spoilt[self.step](loss) if spoils and self.step in self.spoilt else loss

        made.compute_loss = compute_loss
        made.add_callback(self)
        return made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = everything(self.trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.fresh = state.global_step + 1, True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = everything(self.trainer)


def nan(loss: Tensor) -> Tensor:
    return loss * math.nan


def huge(loss: Tensor) -> Tensor:
    return loss + 100


def followed(
    folder: Path,
    spoilt: dict[int, Callable[[Tensor], Tensor]],
    model: Any = None,
    faults: FaultPolicy = ROLLBACK,
    **options: Any,
) -> tuple[Follow, Any]:
    follow = Follow(spoilt)
    given = {"save_strategy": "steps", "save_steps": 3, "faults": faults, **options}
    return follow, follow.watch(trainer(adapted("adalora") if model is None else model, folder, **given))


@pytest.mark.parametrize("spoil", [nan, huge])
def test_a_bad_loss_stops_before_it_reaches_the_weights(tmp_path: Path, spoil: Any) -> None:
    follow, made = followed(tmp_path, {4: spoil}, faults=FaultPolicy(spike_window=4))
    with pytest.raises(TrainingError, match=r"the loss is .* at step 4 \(learning rate .*on_bad_loss='rollback'"):
        made.train()
    assert_same(everything(made), follow.after[3])


@pytest.mark.parametrize(("spoil", "accumulation"), [(nan, 1), (nan, 2), (huge, 1)])
def test_a_bad_loss_takes_everything_back_to_the_checkpoint(
    tmp_path: Path, spoil: Any, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    follow, made = followed(tmp_path, {5: spoil}, gradient_accumulation_steps=accumulation)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert_same(follow.after[5], follow.after[3])
    assert not torch.equal(follow.after[6]["lr"], follow.after[5]["lr"])  # and on it goes
    assert "at step 5" in caplog.text and "rolled back to the state after step 3" in caplog.text
    found = records(made)
    assert [record.get("rollbacks", 0) for record in found] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert math.isnan(found[4]["loss"]) and math.isnan(found[4]["grad_norm"])
    assert all(math.isfinite(record["loss"]) for i, record in enumerate(found) if i != 4)


def test_a_run_that_was_rolled_back_goes_on_as_one_that_began_there(tmp_path: Path) -> None:
    """From the checkpoint after step 3, with the batches from step 6 on."""
    follow, made = followed(tmp_path / "a", {5: nan})
    made.train()
    other, again = followed(tmp_path / "b", {4: nan, 5: nan})
    again.train()
    assert_same(follow.after[8], other.after[8])


def test_what_was_pruned_since_the_checkpoint_is_there_again(tmp_path: Path) -> None:
    # AdaLoRA's budget is final from step 6 on, when its parameters are replaced by smaller ones
    follow, made = followed(tmp_path, {8: nan}, save_steps=5, max_steps=9)
    made.train()
    ranks = {step: sum(len(t) for n, t in state.items() if n.endswith("lora_E.default"))
             for step, state in follow.after.items()}  # fmt: skip
    assert ranks[7] < ranks[5] == ranks[8]
    assert_same(follow.after[8], follow.after[5])


def test_without_a_checkpoint_training_goes_back_to_its_start(tmp_path: Path) -> None:
    follow, made = followed(tmp_path, {2: nan}, save_strategy="no")
    made.train()
    assert_same(follow.after[2], follow.after[0])


def test_rollbacks_are_counted_over_a_resumed_run_and_then_it_stops(tmp_path: Path) -> None:
    faults = FaultPolicy(on_bad_loss="rollback", max_rollbacks=2)
    _, made = followed(tmp_path, {2: nan, 4: nan}, faults=faults, max_steps=6)
    made.train()
    assert made.guard.rollbacks == 2
    _, resumed = followed(tmp_path, {7: nan}, faults=faults)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 7 .*, after 2 rollbacks"):
        resumed.train(resume_from_checkpoint=True)


def test_a_resumed_run_judges_by_the_same_losses(tmp_path: Path) -> None:
    _, made = followed(tmp_path, {})
    made.train()
    losses = [record["loss"] for record in records(made)]
    _, resumed = followed(tmp_path, {7: huge})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.guard.rollbacks == 1
    assert list(resumed.guard.detector.losses)[:3] == pytest.approx(losses[3:6])  # of the last four steps before step 7


def test_a_record_over_several_steps_means_those_that_were_taken(tmp_path: Path) -> None:
    _, made = followed(tmp_path / "a", {3: nan}, logging_steps=4)
    made.train()
    _, each = followed(tmp_path / "b", {3: nan}, logging_steps=1)
    each.train()
    losses = [record["loss"] for record in records(each)]
    assert records(made)[0]["loss"] == pytest.approx((losses[0] + losses[1] + losses[3]) / 3, rel=1e-6)
    assert records(made)[1]["loss"] == pytest.approx(sum(losses[4:]) / 4, rel=1e-6)


def test_a_float16_run_is_rolled_back_with_its_scale(tmp_path: Path) -> None:
    _, made = followed(tmp_path, {5: nan}, model=adapted(dtype=torch.float16))
    made.accelerator.scaler.set_growth_interval(2)
    made.train()
    scales = [record["loss_scale"] / 65536 for record in records(made)]
    assert scales[:6] == [1, 2, 2, 4, 2, 4]  # step 5 has that of step 3 again, and its count of steps


# -- processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_processes_roll_back_for_the_loss_of_one(tmp_path: Path) -> None:
    one, other = together(bad_loss_in_one, tmp_path)
    assert one["rollbacks"] == other["rollbacks"] == 1
    assert_same(one["adapter"], other["adapter"])
    for process in (one, other):  # step 4 begins where step 1 did
        assert_same(process["before"][BAD_STEP], process["before"][0])
        assert any(not torch.equal(t, process["before"][0][name]) for name, t in process["before"][2].items())


@pytest.mark.slow
def test_one_process_out_of_memory_ends_all_with_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"out of memory on one of several processes.*lower per_device"):
        together(out_of_memory_in_one, tmp_path)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [0.0, 1.0]])
def test_a_step_without_labels_changes_nothing_and_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, weights: list[float] | None
) -> None:
    first = [-100, -100, -100, -100] if weights is None or weights[0] else [-100, -100, 3, 4]
    data: dict[str, Any] = {"input_ids": [[1, 2, 3, 4]] * 2, "labels": [first, [-100, -100, 3, 4]]}
    dataset = Dataset.from_dict(data if weights is None else data | {"weight": weights})
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    model = adapted()
    before = trained(model)
    with caplog.at_level(logging.WARNING):
        made = trainer(model, tmp_path, dataset, max_steps=1, **options)
        made.train()
    assert_same(trained(model), before)
    assert records(made)[0]["loss"] == 0 and "step 1: no row of its batches has a label" in caplog.text
    caplog.clear()
    made = trainer(model, tmp_path, dataset, max_steps=2, **options)
    made.train()
    assert records(made)[1]["loss"] > 1 and "step 2" not in caplog.text
