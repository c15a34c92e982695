"""Examples that count one by one, in the ways in which a batch may come: in parts, with blanks, weighing nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from example_processes import CASES, all_outcomes, outcome
from process_groups import PROCESSES, fresh_state, together
from quiet_training import trained
from tiny_pairs import adapted, pairs, trainer

from peftcore import TrainingError
from peftcore.train import Dpo, FaultPolicy, PreferenceCollator

SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}


def test_a_batch_that_does_not_fit_is_computed_in_parts_with_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = adapted().double(), adapted().double()
    rows, options = pairs(4, [1.0, 2.0, 0.5, 3.0]), SGD | {"per_device_train_batch_size": 4}
    trainer(whole, tmp_path / "a", rows, **options).train()
    made = trainer(parts, tmp_path / "b", rows, faults=FaultPolicy(on_out_of_memory="split"), **options)
    real = made.training_objective.example_losses

    def limited(model: Any, inputs: dict[str, Any]) -> Any:
        if len(inputs["labels"]) > 1:
            raise torch.OutOfMemoryError("more than one pair")
        return real(model, inputs)

    monkeypatch.setattr(made.training_objective, "example_losses", limited)
    made.train()
    assert made.splitter.rows_at_once == 1
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(tensor, trained(parts)[name], rtol=1e-6, atol=1e-9)


def test_an_example_without_labels_counts_for_nothing(tmp_path: Path) -> None:
    # with several processes, such a batch fills up the last round
    made = trainer(adapted().double(), tmp_path, pairs(3), objective=Dpo(rpo_alpha=0.5))
    batch = PreferenceCollator(0)(pairs(3))
    blank = batch | {"labels": batch["labels"].clone()}
    blank["labels"][2] = -100
    rest = {name: tensor[:2] for name, tensor in batch.items()}
    model = made.model.eval()
    assert made.compute_loss(model, blank).item() == pytest.approx(made.compute_loss(model, rest).item(), rel=1e-12)
    assert made._get_num_items_in_batch([blank, rest], torch.device("cpu")) == 4
    blank["labels"][:] = -100
    nothing = made.compute_loss(model, blank, num_items_in_batch=torch.tensor(4.0))
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_figures_leave_out_what_weighs_nothing(tmp_path: Path) -> None:
    rows = pairs(3, [1.0, 1.0, 0.0])
    records = []
    for given in (rows, rows[:2]):
        made = trainer(adapted(), tmp_path, given, per_device_train_batch_size=len(given), max_steps=1)
        made.train()
        records.append(made.state.log_history[0])
    assert records[0]["rewards/margins"] == pytest.approx(records[1]["rewards/margins"], rel=1e-5)
    assert math.isfinite(records[0]["loss"])


def test_a_set_whose_weights_are_all_zero_is_an_error(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, pairs(3))
    with pytest.raises(TrainingError, match="all its weights are 0"):
        made.evaluate(made._remove_unused_columns(made.train_dataset.add_column("weight", [0.0] * 3)))


def test_a_batch_of_another_collator_says_which_fits(tmp_path: Path) -> None:
    def collate(rows: Any) -> Any:
        return {name: t for name, t in PreferenceCollator(0)(rows).items() if name != "weight"}

    with pytest.raises(TrainingError, match=r"no 'weight' of its examples; give data_collator=PreferenceCollator"):
        trainer(adapted(), tmp_path, pairs(3), data_collator=collate).train()


def test_a_step_that_was_rolled_back_is_in_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_steps": 4, "logging_steps": 4, "faults": FaultPolicy(on_bad_loss="rollback")}
    made = trainer(adapted(), tmp_path, pairs(8), **options)
    real = made.training_objective.example_losses

    def spoilt(model: Any, inputs: dict[str, Any]) -> Any:
        losses, metrics = real(model, inputs)
        factor = math.nan if made.state.global_step == 1 else 1.0
        return losses * factor, {name: values * factor for name, values in metrics.items()}

    monkeypatch.setattr(made.training_objective, "example_losses", spoilt)
    made.train()
    record = made.state.log_history[0]
    assert record["rollbacks"] == 1
    assert all(math.isfinite(record[name]) for name in ("loss", "rewards/margins", "logps/chosen"))


def test_predictions_that_nobody_keeps_are_refused(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, pairs(4), prediction_loss_only=False)
    with pytest.raises(
        TrainingError, match=r"no predictions for compute_metrics and predict; set prediction_loss_only"
    ):
        made.predict(made.train_dataset)
    made.compute_metrics = lambda predictions: {"seen": len(predictions.predictions)}
    with pytest.raises(TrainingError, match="PreferenceTrainer keeps no predictions"):
        made.evaluate(made.train_dataset)
    made.args.prediction_loss_only = True
    assert "test_rewards/margins" in made.predict(made.train_dataset).metrics


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "now", "expected"), [(1, 2, [[0], []]), (3, 2, [[0, 2], [1]])])
def test_a_run_resumes_with_another_number_of_processes(
    before: int, now: int, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(adapted(), tmp_path, pairs(4))
    state = {"metric_sums": [[{"nll": torch.tensor(number)}] for number in range(before)]}
    monkeypatch.setattr(type(made.accelerator), "num_processes", now)
    for process, numbers in enumerate(expected):
        monkeypatch.setattr(type(made.accelerator), "process_index", process)
        made.training_objective.reset()
        made.training_objective.load_state(state)
        assert [sums["nll"].item() for sums in made.training_objective.unrecorded()] == numbers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process of a data-parallel group came to."""
    return together(all_outcomes, tmp_path_factory.mktemp("group"), backend="gloo")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # in transformers' own set-up
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_that_accumulates_twice_as_much(
    name: str, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    with fresh_state():
        alone = outcome(name, tmp_path, 2 * PROCESSES)
    for process in found:
        for figure in ("losses", "margins"):
            assert process[name][figure] == pytest.approx(alone[figure], abs=1e-5)  # logged in float32
        torch.testing.assert_close(process[name]["evaluation"], alone["evaluation"], rtol=1e-6, atol=1e-8)
        for parameter, tensor in alone["adapter"].items():
            torch.testing.assert_close(process[name]["adapter"][parameter], tensor, rtol=0, atol=1e-7)
