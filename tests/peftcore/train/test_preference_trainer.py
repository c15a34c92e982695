"""Training on pairs: every pair counts alike, the reference stands still, and what AdapterTrainer promises holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import quiet_arguments, trained
from tiny_pairs import adapted, log_prob, pairs, trainer
from transformers import BertConfig, BertForSequenceClassification

from peftcore import LoraConfig, TrainingError, get_peft_model
from peftcore.train import (
    Dpo,
    Orpo,
    PackedCollator,
    PairLogProbs,
    PreferenceCollator,
    PreferenceTrainer,
    pair_log_probs,
)
from peftcore.train import reference_acting as acting

pytestmark = pytest.mark.filterwarnings(
    # the deprecation is inside transformers' own scheduler set-up
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)
WEIGHTS = [0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 1.0, 0.0]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}


def losses_by_hand(model: Any, rows: list[dict[str, Any]], objective: Any) -> torch.Tensor:
    def of_pairs() -> PairLogProbs:
        sides = [
            torch.stack([log_prob(model, row[f"{side}_input_ids"], row[f"{side}_labels"]) for row in rows])
            for side in ("chosen", "rejected")
        ]
        tokens = [
            torch.tensor([len(row[f"{side}_input_ids"]) - row["prompt_length"] for row in rows])
            for side in ("chosen", "rejected")
        ]
        return PairLogProbs(*sides, *tokens)

    policy = of_pairs()
    with acting(model):
        reference = of_pairs()
    return objective.losses(policy, reference)[0]


@pytest.mark.parametrize(
    ("objective", "weights", "accumulation"),
    [  # every two of the three choices meet
        pytest.param(Dpo(beta=0.5, rpo_alpha=0.1), None, 1, id="dpo, alike, at once"),
        pytest.param(Dpo(beta=0.5, rpo_alpha=0.1), WEIGHTS, 4, id="dpo, weighted, accumulated"),
        pytest.param(Orpo(beta=0.5), None, 4, id="orpo, alike, accumulated"),
        pytest.param(Orpo(beta=0.5), WEIGHTS, 1, id="orpo, weighted, at once"),
    ],
)
def test_a_step_is_the_mean_over_all_accumulated_pairs(
    tmp_path: Path, objective: Any, weights: list[float] | None, accumulation: int
) -> None:
    rows, plain = pairs(8, weights), adapted().double()
    weighed = torch.tensor(weights or [1.0] * 8, dtype=torch.float64)
    loss = (losses_by_hand(plain, rows, objective) * weighed).sum() / weighed.sum()
    loss.backward()
    model = adapted().double()
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trainer(model, tmp_path, rows, objective=objective, **SGD, **options)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            stepped = parameter.detach() - parameter.grad
            torch.testing.assert_close(trained(model)[name], stepped, rtol=1e-6, atol=1e-8)


def test_figures_are_means_over_the_pairs_since_the_last_record(tmp_path: Path) -> None:
    rows, model = pairs(8), adapted()
    batch = PreferenceCollator(0)(rows)
    with torch.no_grad():
        policy = pair_log_probs(model, batch)
    with acting(model):
        reference = pair_log_probs(model, batch)
    _, figures = Dpo(beta=0.5).losses(policy, reference)
    options = {"gradient_accumulation_steps": 4, "max_steps": 1}
    made = trainer(model, tmp_path, rows, objective=Dpo(beta=0.5), **options)
    made.train()
    record = made.state.log_history[0]
    for name, figure in figures.items():
        assert record[name] == pytest.approx(figure.mean().item(), rel=1e-4, abs=1e-5), name
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= record.keys()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_is_the_mean_over_pairs_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, rows = adapted().double().eval(), pairs(5, seed=1)
    made = trainer(model, tmp_path, pairs(4), per_device_eval_batch_size=batch_size)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(losses_by_hand(model, rows, Dpo()).mean().item(), rel=1e-6)
    policy = pair_log_probs(model, PreferenceCollator(0)(rows))
    with acting(model):
        reference = pair_log_probs(model, PreferenceCollator(0)(rows))
    right = (policy.chosen - reference.chosen) > (policy.rejected - reference.rejected)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(right.double().mean().item())


def test_training_raises_the_reward_of_what_was_chosen(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=True)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    made = trainer(model, tmp_path, pairs(4), objective=Dpo(beta=1.0), per_device_train_batch_size=4, max_steps=20)
    made.train()
    records = [record for record in made.state.log_history if "loss" in record]
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the model starts as its reference
    assert records[-1]["rewards/accuracies"] == 1.0 and records[-1]["loss"] < 0.2
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


# -- the reference -------------------------------------------------------------------------------------------------


def test_a_reference_taken_once_trains_like_one_taken_in_every_step(tmp_path: Path) -> None:
    results = []
    for once in (False, True):
        model = adapted(lora_dropout=0.2)
        made = trainer(model, tmp_path / str(once), pairs(6), precompute_reference=once)
        made.train()
        results.append((trained(model), made.evaluate()["eval_loss"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_a_reference_taken_once_costs_no_forward_in_a_step(tmp_path: Path) -> None:
    counts = {}
    for once in (False, True):
        model = adapted()
        made = trainer(model, tmp_path / str(once), pairs(6), precompute_reference=once)
        for training in (True, False):  # how the model makes its logits is looked at once in either mode
            pair_log_probs(model.train(training), PreferenceCollator(0)(pairs(2)))
        forwards: list[int] = []
        model.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        made.train()
        counts[once] = len(forwards)
    assert counts == {False: 6, True: 3}


def test_training_goes_on_from_an_adapter_that_stays_the_reference(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "start")
    model.load_adapter(tmp_path / "start", "start")
    before = {n: p.clone() for n, p in model.named_parameters() if ".start." in n}
    made = trainer(model, tmp_path, pairs(6), ref_adapter_name="start")
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2
    assert model.active_adapters == ["default"] and before
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


REFERENCES: Any = pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str
)


@REFERENCES
@pytest.mark.parametrize("once", [False, True])
def test_by_default_the_reference_is_the_model_as_it_was_when_training_began(
    tmp_path: Path, once: bool, options: dict[str, Any]
) -> None:
    model, batch = adapted(lora_dropout=0.3, **options), PreferenceCollator(0)(pairs(6))
    with torch.no_grad():
        start = pair_log_probs(model.eval(), batch)
    made = trainer(model, tmp_path, pairs(6), reference="start", precompute_reference=once, **SGD)
    made.model.train()
    assert made.training_objective.reference_log_probs(model, batch).chosen.tolist() == pytest.approx(
        start.chosen.tolist(), rel=1e-5
    )
    made.train()
    assert made.training_objective.reference_log_probs(model, batch).chosen.tolist() == pytest.approx(
        start.chosen.tolist(), rel=1e-5
    )
    with torch.no_grad():
        assert not torch.allclose(pair_log_probs(model.eval(), batch).chosen, start.chosen)


@REFERENCES
def test_without_dropout_a_run_starts_as_its_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    made = trainer(adapted(**options), tmp_path, pairs(6), reference="start", max_steps=1)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2


def test_the_default_is_the_start_and_other_references_are_refused(tmp_path: Path) -> None:
    made = PreferenceTrainer(
        model=adapted(), args=quiet_arguments(tmp_path), data_collator=PreferenceCollator(0), train_dataset=pairs(2)
    )
    assert made.training_objective.start_model is not None
    with pytest.raises(TrainingError, match="reference must be one of start, base; got 'bare'"):
        trainer(adapted(), tmp_path, pairs(2), reference="bare")


def test_the_reference_draws_no_random_numbers_and_drops_nothing(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5)
    model.config.attention_dropout = 0.5
    made = trainer(model, tmp_path, pairs(4))
    inputs = PreferenceCollator(0)(pairs(4))
    model.train()
    state = torch.get_rng_state()
    first, second = (made.training_objective.reference_log_probs(model, inputs) for _ in range(2))
    assert torch.equal(first.chosen, second.chosen)
    assert torch.equal(torch.get_rng_state(), state)


# -- what AdapterTrainer promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("once", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, method: str, once: bool) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 6,
        "train_sampling_strategy": "group_by_length",
        "precompute_reference": once,
    }
    straight, resumed = (
        trainer(adapted(method, lora_dropout=0.2), tmp_path / name, pairs(8), **options) for name in ("a", "b")
    )
    straight.train()
    torch.rand(7)  # another process has drawn other numbers
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    logs = [[r for r in made.state.log_history if "loss" in r] for made in (straight, resumed)]
    assert logs[0] == logs[1]
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name]), name


def test_the_regulariser_counts_once_a_step_whatever_the_accumulation(tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 4):
        model = adapted("adalora").double()
        expected = model.adapter_regularizer().item()
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        made = trainer(model, tmp_path / str(accumulation), pairs(8), **SGD, **options)
        made.train()
        assert made.state.log_history[0]["regularizer"] == pytest.approx(expected, rel=1e-6)
        results.append(trained(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-6, atol=1e-8)


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize(
    ("model", "options", "fault"),
    [
        (adapted, {"data_collator": PackedCollator()}, "packed rows have no bounds.*PreferenceCollator"),
        (adapted, {"label_smoothing_factor": 0.1}, "defines the loss itself"),
        (adapted, {"ref_adapter_name": "default"}, "the reference adapter 'default' is trained"),
        (
            lambda: get_peft_model(bert(), LoraConfig(target_modules="all-linear")),
            {},
            "need a causal language model; BertForSequenceClassification is not one",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, model: Any, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(TrainingError, match=fault):
        trainer(model(), tmp_path, pairs(4), **options)
