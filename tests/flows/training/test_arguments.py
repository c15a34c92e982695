"""The section `train` of params.yaml as arguments of transformers' Trainer."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from flows.errors import StageError
from flows.params import Params, Train
from flows.training.arguments import OPTIMIZERS, fault_policy, training_arguments

STEPS = 40


def arguments(folder: Path, **train: Any) -> TrainingArguments:
    return training_arguments(Params.model_validate({"train": train}), folder, STEPS)


def learning_rates(given: TrainingArguments) -> list[float]:
    """The learning rate of each optimiser step, by transformers' own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], given.learning_rate)
    warmup = int(given.warmup_steps)
    scheduler = get_scheduler(given.lr_scheduler_type, optimizer, warmup, given.max_steps)
    rates = []
    for _ in range(given.max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", get_args(Train.model_fields["schedule"].annotation))
def test_every_schedule_warms_up_over_its_share_of_the_steps_to_the_learning_rate(
    tmp_path: Path, schedule: str
) -> None:
    rates = learning_rates(arguments(tmp_path, schedule=schedule, learning_rate=0.02, warmup_share=0.26))
    warmup = math.ceil(0.26 * STEPS)
    assert rates[: warmup + 1] == pytest.approx([0.02 * step / warmup for step in range(warmup + 1)])


def test_a_number_of_warm_up_steps_replaces_the_share(tmp_path: Path) -> None:
    rates = learning_rates(arguments(tmp_path, learning_rate=0.02, warmup_share=0.5, warmup_steps=4))
    assert rates[:5] == pytest.approx([0, 0.005, 0.01, 0.015, 0.02]) and rates[5] < 0.02
    with pytest.raises(StageError, match=r"train\.warmup_steps is 40, and the run has 40 steps"):
        arguments(tmp_path, warmup_steps=STEPS)


@pytest.mark.parametrize(("schedule", "at_half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_a_schedule_without_warm_up_has_its_known_rate_half_way(tmp_path: Path, schedule: str, at_half: float) -> None:
    rates = learning_rates(arguments(tmp_path, schedule=schedule, learning_rate=0.02, warmup_share=0.0))
    assert (rates[0], rates[STEPS // 2]) == pytest.approx((0.02, 0.02 * at_half))


def test_each_optimiser_of_params_yaml_is_one_of_transformers(tmp_path: Path) -> None:
    assert set(OPTIMIZERS) == set(get_args(Train.model_fields["optimizer"].annotation))
    for name in OPTIMIZERS:
        arguments(tmp_path, optimizer=name)  # transformers refuses a name that it does not know


def test_a_pack_is_one_row_and_other_batches_have_their_rows(tmp_path: Path) -> None:
    for batching in ("grouped", "padded", "padding_free"):
        assert arguments(tmp_path, batching=batching, batch_size=6).per_device_train_batch_size == 6
    assert arguments(tmp_path, batching="packed", batch_size=6).per_device_train_batch_size == 1


def test_padding_is_not_counted_as_tokens(tmp_path: Path) -> None:
    counted = {
        batching: arguments(tmp_path, batching=batching).include_num_input_tokens_seen
        for batching in get_args(Train.model_fields["batching"].annotation)
    }
    assert counted == {"grouped": "non_padding", "padded": "non_padding", "padding_free": "all", "packed": "all"}


def test_the_best_evaluated_step_is_kept_and_nothing_is_reported_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    given = arguments(tmp_path, save_checkpoints=3)
    assert given.load_best_model_at_end and (given.metric_for_best_model, given.greater_is_better) == (
        "eval_loss",
        False,
    )
    assert given.eval_steps == given.save_steps == given.max_steps == STEPS, "the last step is one of them"
    assert (given.save_total_limit, given.report_to) == (3, [])


def test_faults_are_handled_as_the_parameters_say() -> None:
    chosen = {
        "on_out_of_memory": "stop",
        "on_bad_loss": "rollback",
        "spike_deviations": 4.5,
        "spike_window": 9,
        "max_rollbacks": 2,
    }
    policy = asdict(fault_policy(Params.model_validate({"train": chosen})))
    assert policy == policy | chosen
