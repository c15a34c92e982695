"""Training with a teacher: the base, an adapter or another model, and what AdapterTrainer promises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import VOCABULARY, quiet_arguments, tiny_llama, trained, without_printing
from tiny_answers import answers
from tiny_pairs import adapted
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from peftcore import ConfigError, LoraConfig, PeftModel, TrainingError, get_peft_model
from peftcore.train import (
    Distillation,
    DistillationTrainer,
    PackedCollator,
    RightPaddingCollator,
    shared_copy,
    token_divergences,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # in transformers
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}
WEIGHTS = [0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 1.0, 0.0]


def chats(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    return [{n: v for n, v in row.items() if n != "desirable"} for row in answers(count, weights, seed)]


def larger() -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> DistillationTrainer:
    own: dict[str, Any] = {n: options.pop(n) for n in ("distillation", "teacher", "data_collator") if n in options}
    steps: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    made = DistillationTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(chats(5, seed=1)),
        **({"data_collator": RightPaddingCollator(0)} | own),
    )
    return without_printing(made)


def parts_by_hand(model: Any, teacher: Any, rows: list[dict[str, Any]], kind: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross entropy and divergence over all supervised tokens, row by row without padding."""
    sums, weight = torch.zeros(2, dtype=torch.float64), 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        at = labels != -100
        with torch.no_grad():
            other = teacher(ids).logits[0, :-1][at]
        logits = model(ids).logits[0, :-1][at]
        nll = F.cross_entropy(logits, labels[at], reduction="sum")
        divergence = token_divergences(logits, other, kind, 1.5).sum()
        sums = sums + row.get("weight", 1.0) * torch.stack([nll, divergence])
        weight += row.get("weight", 1.0) * int(at.sum())
    nll, divergence = sums / weight
    return nll, divergence


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("weights", "accumulation"), [(None, 1), (WEIGHTS, 2)], ids=["alike", "weighted"])
def test_a_step_is_the_mean_over_all_accumulated_tokens(
    tmp_path: Path, kind: Any, weights: list[float] | None, accumulation: int
) -> None:
    rows, plain, teacher = chats(8, weights), adapted().double(), larger().double().eval()
    nll, divergence = parts_by_hand(plain, teacher, rows, kind)
    loss = 0.3 * nll + 0.7 * divergence
    loss.backward()
    model = adapted().double()
    made = trainer(
        model,
        tmp_path,
        rows,
        teacher=teacher,
        distillation=Distillation(kind, weight=0.7, nll_weight=0.3, temperature=1.5),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **SGD,
    )
    made.train()
    record = made.state.log_history[0]
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert record["divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            expected = parameter.detach() - parameter.grad
            torch.testing.assert_close(trained(model)[name], expected, rtol=1e-6, atol=1e-8)


def test_evaluation_has_the_same_loss_as_training_and_its_parts(tmp_path: Path) -> None:
    model, teacher, rows = adapted().double().eval(), larger().double().eval(), chats(5, seed=1)
    distillation = Distillation("reverse_kl", weight=0.7, nll_weight=0.3, temperature=1.5)
    made = trainer(model, tmp_path, chats(4), teacher=teacher, distillation=distillation)
    metrics = made.evaluate()
    with torch.no_grad():
        nll, divergence = parts_by_hand(model, teacher, rows, "reverse_kl")
    assert metrics["eval_nll"] == pytest.approx(nll.item(), rel=1e-6)
    assert metrics["eval_divergence"] == pytest.approx(divergence.item(), rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx((0.3 * nll + 0.7 * divergence).item(), rel=1e-6)


def test_packed_rows_have_the_loss_of_padded_ones(tmp_path: Path) -> None:
    losses = []
    for name, collator in (("padded", RightPaddingCollator(0)), ("packed", PackedCollator())):
        made = trainer(adapted(), tmp_path / name, chats(4), teacher=larger(), data_collator=collator, **SGD)
        made.train()
        losses.append(made.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_the_student_comes_near_its_teacher(tmp_path: Path) -> None:
    made = trainer(
        adapted(init_lora_weights=True),
        tmp_path,
        chats(6),
        teacher=larger(),
        distillation=Distillation(nll_weight=0.0),
        per_device_train_batch_size=6,
        max_steps=40,
    )
    made.train()
    records = [record["divergence"] for record in made.state.log_history if "divergence" in record]
    assert records[-1] < records[0] / 3


def test_the_base_is_the_default_teacher_and_holds_the_adapter_back(tmp_path: Path) -> None:
    divergences = {}
    for weight in (0.001, 1000.0):
        model = adapted(init_lora_weights=True)
        options = {"distillation": Distillation(weight=weight), "max_steps": 40, "per_device_train_batch_size": 8}
        made = trainer(model, tmp_path / str(weight), chats(8), **options)
        made.train()
        steps = [record["divergence"] for record in made.state.log_history if "divergence" in record]
        assert steps[0] == pytest.approx(0, abs=1e-5)
        divergences[weight] = steps[-1]
    assert divergences[1000.0] < divergences[0.001] / 3


def test_a_frozen_adapter_is_a_teacher_and_stays_as_it_is(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "champion")
    model.load_adapter(tmp_path / "champion", "champion")
    before = {name: p.clone() for name, p in model.named_parameters() if ".champion." in name}
    made = trainer(model, tmp_path, chats(8), teacher="champion")
    made.train()
    assert made.state.log_history[0]["divergence"] == pytest.approx(0, abs=1e-5)
    assert model.active_adapters == ["default"] and before
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_another_adapter_on_a_shared_copy_is_the_same_teacher(tmp_path: Path) -> None:
    source = adapted()
    source.save_pretrained(tmp_path / "champion")
    base = tiny_llama()
    copied = shared_copy(base)
    teacher = PeftModel.from_pretrained(copied, tmp_path / "champion")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.tensor([[3, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(ids).logits, source.eval()(ids).logits)
        torch.testing.assert_close(model.eval()(ids).logits, tiny_llama().eval()(ids).logits)
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert len(shared) == sum(1 for _ in tiny_llama().parameters())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "logging_steps": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "train_sampling_strategy": "group_by_length"}
    straight, resumed = (
        trainer(adapted(lora_dropout=0.2), tmp_path / name, chats(9), teacher=larger(), **options) for name in "ab"
    )
    straight.train()
    torch.rand(7)  # another process has drawn other numbers
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    logs = [[r for r in made.state.log_history if "loss" in r] for made in (straight, resumed)]
    assert logs[0] == logs[1]
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name]), name


def test_a_run_resumes_with_more_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = trainer(adapted(), tmp_path, chats(2)).training_objective
    monkeypatch.setattr(type(objective.trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(type(objective.trainer.accelerator), "process_index", 1)
    objective.load_state({"sums": [[torch.ones(3)]]})
    assert objective.unrecorded() == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(TrainingError, match="the teacher adapter 'default' is trained"):
        trainer(model, tmp_path, chats(2), teacher="default")
    with pytest.raises(TrainingError, match="the teacher is the model that is trained"):
        trainer(model, tmp_path, chats(2), teacher=model)
    with pytest.raises(TrainingError, match="needs a causal language model and plain next-token cross entropy"):
        trainer(model, tmp_path, chats(2), label_smoothing_factor=0.1)


def test_the_teacher_is_frozen(tmp_path: Path) -> None:
    teacher: nn.Module = larger().train()
    trainer(adapted(), tmp_path, chats(2), teacher=teacher)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd; got 'kl'"),
        ({"weight": 0.0}, "weight must be above 0; got 0.0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"nll_weight": -1.0}, "nll_weight must be at least 0"),
        ({"beta": 1.0}, "beta must be between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(**options)
