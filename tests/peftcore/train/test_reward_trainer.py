"""Training of reward models: TRL's run step by step, weights, metrics of a set, the head, and an exact resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet_arguments, trained, without_printing
from tiny_pairs import pairs
from tiny_rewards import adapted, answers, decoder, encoder

from peftcore import PeftModel, TrainingError
from peftcore.train import (
    BradleyTerry,
    ClassificationCollator,
    PackedCollator,
    PreferenceCollator,
    RewardCollator,
    RewardTrainer,
    pair_rewards,
    sequence_rewards,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # inside transformers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's of itself
]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}


def trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> RewardTrainer:
    own: dict[str, Any] = {name: options.pop(name) for name in ("objective", "data_collator") if name in options}
    steps: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    made = RewardTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(answers(5, seed=1)),
        **({"data_collator": RewardCollator(0)} | own),
    )
    return without_printing(made)


def rewards_alone(model: Any, rows: list[dict[str, Any]], side: str) -> torch.Tensor:
    """The rewards of one side, each of a sequence that is alone in its forward."""
    return torch.cat([model(torch.tensor([row[f"{side}_input_ids"]])).logits[:, 0] for row in rows])


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [None, 0.05])
def test_a_run_is_trls(tmp_path: Path, coefficient: float | None) -> None:
    from trl_runs import rewards

    options = {"max_steps": 4, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.2}
    texts = [(prompt, f" {answer}") for prompt in ("a b c", "a b", "c a") for answer in ("d e", "f g h", "b", "a e f")]
    rows: list[dict[str, Any]] = [{"prompt": p, "chosen": a, "rejected": " c"} for p, a in texts]
    if coefficient is not None:
        rows = [row | {"margin": 0.1 * (n % 4)} for n, row in enumerate(rows)]
    theirs: Any = rewards(
        adapted(start=True), tmp_path / "trl", rows, center_rewards_coefficient=coefficient, disable_dropout=True,
        **options,
    )  # fmt: skip
    tokens = [
        {"chosen_input_ids": row["chosen_ids"], "rejected_input_ids": row["rejected_ids"]}
        | ({"margin": row["margin"]} if "margin" in row else {})
        for row in theirs.train_dataset
    ]
    ours = trainer(
        adapted(start=True), tmp_path, tokens, per_device_train_batch_size=2,
        objective=BradleyTerry(coefficient or 0.0), **options,
    )  # fmt: skip
    theirs.train()
    ours.train()
    records = [[r for r in made.state.log_history if "loss" in r] for made in (ours, theirs)]
    assert len(records[0]) == len(records[1]) == 4
    for mine, trls in zip(*records, strict=True):
        for name in ("loss", "accuracy", "margin", "mean_reward"):
            assert mine[name] == pytest.approx(trls[name], rel=2e-3, abs=2e-4), name  # TRL rounds its records
    assert abs(records[0][-1]["loss"] - records[0][0]["loss"]) > 0.01  # the steps changed the model
    mine, trls = trained(ours.model), trained(theirs.model)
    assert mine.keys() == trls.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, trls[name], rtol=1e-4, atol=1e-6)


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "accumulation"), [(decoder, 1), (decoder, 4), (encoder, 4)])
def test_a_step_is_the_weighted_mean_over_all_accumulated_pairs(tmp_path: Path, make: Any, accumulation: int) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    margins = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0, 0.0, 0.25, 0.0], dtype=torch.float64)
    rows = answers(8)
    plain = adapted(make).double()
    chosen, rejected = (rewards_alone(plain, rows, side) for side in ("chosen", "rejected"))
    loss = -((chosen - rejected - margins).sigmoid().log() * weights).sum() / weights.sum()
    loss.backward()
    model = adapted(make).double()
    weighed = [row | {"weight": w, "margin": m} for row, w, m in zip(rows, weights.tolist(), margins.tolist(),
                                                                     strict=True)]  # fmt: skip
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trainer(model, tmp_path, weighed, **options, **SGD)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    mine = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter - parameter.grad, rtol=1e-6, atol=1e-8)


def test_a_pair_without_a_margin_has_the_margin_zero() -> None:
    rows: list[dict[str, Any]] = answers(2)
    assert "margin" not in RewardCollator(0)(rows)
    assert RewardCollator(0)([rows[0] | {"margin": None}, rows[1] | {"margin": 2.0}])["margin"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("pad", [0, 3])
def test_padding_changes_no_reward(pad: int) -> None:
    model, rows = adapted().double().eval(), answers(6)
    assert model.config.pad_token_id == 0
    with torch.no_grad():
        chosen, rejected = pair_rewards(model, RewardCollator(pad)(rows))
        torch.testing.assert_close(chosen, rewards_alone(model, rows, "chosen"))
        torch.testing.assert_close(rejected, rewards_alone(model, rows, "rejected"))


# -- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sampling"), [(1, "random"), (2, "group_by_length"), (5, "random")])
def test_metrics_are_of_the_whole_set_whatever_the_batches(tmp_path: Path, batch_size: int, sampling: str) -> None:
    model, rows = adapted().double().eval(), answers(5, seed=1)
    options: dict[str, Any] = {"per_device_eval_batch_size": batch_size, "train_sampling_strategy": sampling}
    metrics = trainer(model, tmp_path, answers(4), **options).evaluate()
    chosen, rejected = (rewards_alone(model, rows, side).detach() for side in ("chosen", "rejected"))
    assert metrics["eval_loss"] == pytest.approx(-(chosen - rejected).sigmoid().log().mean().item(), rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean().item())
    assert metrics["eval_mean_reward"] == pytest.approx((chosen + rejected).mean().item() / 2)


def marked(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs whose chosen answer holds the token 7, which no other answer holds."""
    rows = answers(count, seed)
    for row in rows:
        for side, last in (("chosen", 7), ("rejected", 8)):
            row[f"{side}_input_ids"] = [8 if each == 7 else each for each in row[f"{side}_input_ids"][:-1]] + [last]
    return rows


def test_a_reward_model_learns_what_can_be_learnt(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    made = trainer(adapted(start=True), tmp_path, marked(64, 0), logging_steps=30, **options)
    made.train()
    metrics = made.evaluate(eval_dataset=Dataset.from_list(marked(20, 1)))  # pyright: ignore[reportArgumentType]
    assert metrics["eval_accuracy"] >= 0.95 and metrics["eval_loss"] < 0.3


# -- the head, and resuming ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("make", [decoder, encoder])
def test_the_head_is_saved_with_the_adapter_in_pefts_format(tmp_path: Path, make: Any) -> None:
    import peft

    model = adapted(make)
    trainer(model, tmp_path / "run", answers(8), max_steps=2).train()
    model.save_pretrained(tmp_path / "ours")
    batch = ClassificationCollator(0)([{"input_ids": row["chosen_input_ids"], "label": 0} for row in answers(5, 2)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = sequence_rewards(model.eval(), **inputs)
    theirs: Any = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(**inputs).logits[:, 0], expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    torch.testing.assert_close(sequence_rewards(back, **inputs), expected, rtol=1e-5, atol=1e-5)
    head = model.score if make is decoder else model.classifier
    assert not torch.equal(head.current().weight, (make().score if make is decoder else make().classifier).weight)


def test_a_resumed_run_ends_bit_equal(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [row | {"margin": 0.5 * (n % 2)} for n, row in enumerate(answers(12))]
    options: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    model = adapted(start=True)
    whole = trainer(copy.deepcopy(model), tmp_path / "whole", rows, save_steps=3, **options)
    whole.train()
    resumed = trainer(copy.deepcopy(model), tmp_path / "resumed", rows, save_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = trained(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(resumed.model).items())


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_classifier_of_several_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"logits of shape \(8, 3\) for 8 answers.*num_labels=1"):
        trainer(adapted(lambda: decoder(3)), tmp_path, answers(4)).train()


def test_packed_rows_and_other_collators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="packed rows need a causal language model"):
        trainer(adapted(), tmp_path, answers(4), data_collator=PackedCollator())
    flat = [{"input_ids": row["chosen_input_ids"], "label": 0} for row in answers(2)]
    made = trainer(adapted(), tmp_path, answers(4))
    with pytest.raises(TrainingError, match=r"input_ids have the shape \(2, 8\).*RewardCollator"):
        made.compute_loss(made.model, ClassificationCollator(0)(flat))  # pyright: ignore[reportArgumentType]


def test_the_collator_of_preferences_fits_too() -> None:
    rows = pairs(4)
    model = adapted().double().eval()
    ours, theirs = (pair_rewards(model, collate(rows)) for collate in (RewardCollator(0), PreferenceCollator(0)))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
