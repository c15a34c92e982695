"""KTO training: TRL's run step by step, reference points of batches and sets, and what AdapterTrainer promises."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet, tiny_llama, trained, without_printing
from tiny_answers import answers, trainer
from tiny_pairs import adapted, log_prob
from transformers import BertConfig, BertForSequenceClassification

from peftcore import LoraConfig, TrainingError, get_peft_model
from peftcore.train import (
    Kto,
    KtoTrainer,
    PackedCollator,
    RightPaddingCollator,
    UnpairedPreferenceCollator,
    mismatched_answers,
    reference_acting,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # inside transformers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's of itself
]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}
WEIGHTS = [0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 1.0, 0.0]


def ratios_by_hand(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    def of_rows() -> torch.Tensor:
        return torch.stack([log_prob(model, row["input_ids"], row["labels"]) for row in rows])

    policy = of_rows()
    with reference_acting(model):
        reference = of_rows()
    return policy - reference


def losses_by_hand(model: Any, rows: list[dict[str, Any]], kto: Kto, batch: int) -> torch.Tensor:
    """Losses of rows in batches, each with its own reference point."""
    losses = []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        point = ratios_by_hand(model, mismatched_answers(part)).mean().clamp(min=0).detach()
        desirable = torch.tensor([row["desirable"] for row in part])
        losses.append(kto.losses(ratios_by_hand(model, part), desirable, point))
    return torch.cat(losses)


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_run_is_trls(tmp_path: Path, loss: Any) -> None:
    from trl_runs import KTOConfig, KTOTrainer, tokenizer

    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    options |= {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 2.0}
    texts = [(prompt, f" {answer}") for prompt in ("a b c", "a b", "c a") for answer in ("d e", "f g h", "b", "a e f")]
    rows = [{"prompt": p, "completion": a, "label": n % 3 != 1} for n, (p, a) in enumerate(texts)]
    theirs: Any = without_printing(
        KTOTrainer(
            model=adapted(init_lora_weights=True),
            ref_model=tiny_llama(),
            args=KTOConfig(**quiet(tmp_path / "trl", beta=0.3, loss_type=loss, **weights, **options)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
    )
    tokens = [
        {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["completion_ids"],
            "desirable": row["label"],
        }
        for row in theirs.train_dataset
    ]
    for name in ("bf16", "gradient_checkpointing"):
        options.pop(name)
    ours = trainer(
        adapted(init_lora_weights=True), tmp_path, tokens, objective=Kto(beta=0.3, loss=loss, **weights), **options
    )
    theirs.train()
    ours.train()
    records = [[r for r in made.state.log_history if "loss" in r] for made in (ours, theirs)]
    assert len(records[0]) == len(records[1]) == 4
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
    for mine, trls in zip(*records, strict=True):
        for name in [*names, *(["kl"] if loss == "kto" else [])]:
            assert mine[name] == pytest.approx(trls[name], rel=2e-3, abs=2e-4), name  # TRL rounds its records
    assert (records[0][-1]["kl"] > 0.1) is (loss == "kto")
    mine, trls = trained(ours.model), trained(theirs.model)
    assert mine.keys() == trls.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, trls[name], rtol=1e-4, atol=1e-6)


# -- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "accumulation"), [(None, 1), (WEIGHTS, 2)], ids=["alike, at once", "weighted, accumulated"]
)
def test_a_step_is_the_mean_over_all_accumulated_answers(
    tmp_path: Path, weights: list[float] | None, accumulation: int
) -> None:
    rows, plain, kto = answers(8, weights), adapted().double(), Kto(beta=0.5, desirable_weight=1.4)
    weighed = torch.tensor(weights or [1.0] * 8, dtype=torch.float64)
    loss = (losses_by_hand(plain, rows, kto, 8 // accumulation) * weighed).sum() / weighed.sum()
    loss.backward()
    model = adapted().double()
    options: dict[str, Any] = {"per_device_train_batch_size": 8 // accumulation}
    options["gradient_accumulation_steps"] = accumulation
    options["train_sampling_strategy"] = "sequential"
    made = trainer(model, tmp_path, rows, objective=kto, **SGD, **options)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(trained(model)[name], parameter.detach() - parameter.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_has_one_reference_point_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model, rows = adapted().double().eval(), answers(5, seed=1)
    made = trainer(model, tmp_path, answers(4), objective=Kto(beta=0.5), per_device_eval_batch_size=batch_size)
    metrics = made.evaluate()
    with torch.no_grad():
        expected = losses_by_hand(model, rows, Kto(beta=0.5), batch=5)
        ratios = ratios_by_hand(model, rows)
        point = ratios_by_hand(model, mismatched_answers(rows)).mean().clamp(min=0)
    desirable = torch.tensor([row["desirable"] for row in rows])
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert metrics["eval_kl"] == pytest.approx(point.item(), rel=1e-6)
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.5 * ratios[desirable].mean().item(), rel=1e-6)
    assert metrics["eval_rewards/rejected"] == pytest.approx(0.5 * ratios[~desirable].mean().item(), rel=1e-6)
    right = torch.where(desirable, ratios > point, ratios < point)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(right.double().mean().item())


def test_training_raises_rewards_of_desirable_answers_over_the_others(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=True)
    made = trainer(model, tmp_path, answers(6), objective=Kto(beta=1.0), per_device_train_batch_size=6, max_steps=40)
    made.train()
    records = [record for record in made.state.log_history if "loss" in record]
    assert records[0]["loss"] == pytest.approx(0.5, abs=1e-4)  # the model starts as its reference
    assert records[-1]["loss"] < 0.25
    assert records[-1]["rewards/chosen"] > 0 > records[-1]["rewards/rejected"]
    assert records[-1]["rewards/margins"] > 2


# -- mismatched answers --------------------------------------------------------------------------------------------


def test_each_prompt_gets_the_answer_before_it() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
        {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
    ]
    assert mismatched_answers(rows) == [
        {"input_ids": [1, 2, 5, 6], "labels": [-100, -100, 5, 6]},
        {"input_ids": [4, 3], "labels": [-100, 3]},
    ]
    assert mismatched_answers(rows, max_length=3)[0] == {"input_ids": [1, 2, 5], "labels": [-100, -100, 5]}


def test_a_batch_of_one_row_has_no_mismatched_answer(tmp_path: Path) -> None:
    rows = answers(1)
    assert not [name for name in UnpairedPreferenceCollator(0)(rows) if name.startswith("mismatched")]
    made = trainer(adapted(), tmp_path, answers(5), max_steps=2)  # the second batch is the fifth row alone
    made.train()
    assert [record["kl"] for record in made.state.log_history if "loss" in record][1] == 0


def test_a_process_without_mismatched_answers_does_not_change_the_reference_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(adapted(), tmp_path, answers(4))
    objective, batch = made.training_objective, UnpairedPreferenceCollator(0)(answers(4))
    alone = objective.with_reference_point(made.model, batch)["reference_point"]
    # a second process has a batch of one row, so it adds zeros
    monkeypatch.setattr(made.accelerator, "reduce", lambda tensor, how: tensor / 2 if how == "mean" else tensor)
    both = objective.with_reference_point(made.model, batch)["reference_point"]
    assert alone > 0.01
    torch.testing.assert_close(both, alone)


def test_parts_of_a_batch_have_the_gradients_of_the_whole(tmp_path: Path) -> None:
    results = []
    for rows_at_once in (None, 3):
        model = adapted().double()
        made = trainer(model, tmp_path, answers(8), per_device_train_batch_size=8, **SGD)
        made._start_run, start = (lambda: None), made._start_run  # keep the splitter that is set below
        start()
        made.splitter.rows_at_once = rows_at_once
        made.train()
        results.append(trained(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-9, atol=1e-12)


# -- the reference -------------------------------------------------------------------------------------------------


def test_by_default_the_reference_is_the_model_as_it_was_when_training_began(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, answers(4), reference="start", max_steps=1)
    made.train()
    record = made.state.log_history[0]
    assert record["loss"] == pytest.approx(0.5, abs=1e-4) and record["kl"] == pytest.approx(0, abs=1e-5)


def test_a_frozen_adapter_may_be_the_reference(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "start")
    model.load_adapter(tmp_path / "start", "start")
    made = trainer(model, tmp_path, answers(4), ref_adapter_name="start", max_steps=1)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert model.active_adapters == ["default"]


def test_the_reference_point_draws_no_random_numbers_and_drops_nothing(tmp_path: Path) -> None:
    model = adapted(lora_dropout=0.5)
    made = trainer(model, tmp_path, answers(4))
    model.train()
    flags = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first, second = (
        made.training_objective.with_reference_point(model, UnpairedPreferenceCollator(0)(answers(4))) for _ in range(2)
    )
    assert torch.equal(first["reference_point"], second["reference_point"])
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags


# -- what AdapterTrainer promises ----------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 6,
        "train_sampling_strategy": "group_by_length",
    }
    straight, resumed = (
        trainer(adapted(lora_dropout=0.2), tmp_path / name, answers(9), **options) for name in ("a", "b")
    )
    straight.train()
    torch.rand(7)  # another process has drawn other numbers
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    logs = [[r for r in made.state.log_history if "loss" in r] for made in (straight, resumed)]
    assert logs[0] == logs[1]
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name]), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="reference must be one of start, base; got 'bare'"):
        trainer(adapted(), tmp_path, answers(2), reference="bare")
    with pytest.raises(TrainingError, match=r"per_device_train_batch_size=2 or more"):
        trainer(adapted(), tmp_path, answers(2), per_device_train_batch_size=1)
    trainer(adapted(), tmp_path, answers(2), per_device_train_batch_size=1, objective=Kto(loss="apo_zero_unpaired"))
    with pytest.raises(TrainingError, match=r"data_collator=UnpairedPreferenceCollator\(pad_token_id\)"):
        trainer(adapted(), tmp_path, answers(2), data_collator=PackedCollator())
    with pytest.raises(TrainingError, match=r"data_collator=UnpairedPreferenceCollator\(pad_token_id\)"):
        trainer(adapted(), tmp_path, answers(2), data_collator=RightPaddingCollator(0)).train()
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    model = get_peft_model(bert, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TrainingError, match="unpaired preferences need a causal language model"):
        trainer(model, tmp_path, answers(2))


def test_datasets_of_any_form_are_evaluated_alike(tmp_path: Path) -> None:
    rows, model = answers(5, seed=1), adapted().eval()
    made = trainer(model, tmp_path, answers(4))
    expected = made.evaluate()["eval_loss"]
    named = KtoTrainer(
        model=copy.deepcopy(model),
        args=made.args,
        data_collator=UnpairedPreferenceCollator(0),
        train_dataset=answers(4),  # type: ignore[arg-type]
        eval_dataset={"listed": rows},  # type: ignore[arg-type]
        reference="base",
    )
    assert named.evaluate()["eval_listed_loss"] == pytest.approx(expected, rel=1e-6)
