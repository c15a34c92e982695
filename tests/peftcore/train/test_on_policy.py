"""On-policy distillation: TRL's sampling and loss, shares of batches, and exact resumption."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import VOCABULARY, quiet_arguments, trained, without_printing
from tiny_answers import answers
from tiny_pairs import adapted
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from peftcore import ConfigError, TrainingError
from peftcore.train import Distillation, DistillationTrainer, OnPolicy, PackedCollator, RightPaddingCollator, Sampling
from peftcore.train.on_policy import SAMPLED, prompts_of
from peftcore.train.sampling import AnswerSampler, supervised_batch

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # in transformers
SAMPLING = Sampling(max_new_tokens=5)


def chats(count: int) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in answers(count)]


def larger() -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def trainer(model: Any, folder: Path, **options: Any) -> DistillationTrainer:
    names = ("distillation", "teacher", "data_collator", "on_policy")
    own: dict[str, Any] = {
        "data_collator": RightPaddingCollator(0),
        "teacher": larger(),
        "on_policy": OnPolicy([3], 1.0, SAMPLING),
    }
    own |= {name: options.pop(name) for name in names if name in options}
    steps: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    made = DistillationTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(chats(12)),
        **own,
    )
    return without_printing(made)


@pytest.mark.filterwarnings("ignore")  # TRL's of itself
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_answers_and_loss_are_trls(tmp_path: Path, kind: Any, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL's GKDTrainer is the oracle").GKDTrainer
    model, teacher, end = adapted().eval(), larger().eval(), 3
    distillation = Distillation(kind, weight=1.0, nll_weight=0.0, beta=beta if kind == "jsd" else 0.5)
    made = trainer(model, tmp_path, distillation=distillation, teacher=teacher)
    prompts = [[5, 6, 7, 8], [9, 4]]
    left = {
        "prompts": torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]]),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0)
    ids, mask, labels = gkd.generate_on_policy_outputs(model, left, config)
    sampled = AnswerSampler(SAMPLING, [end], 0).answers(model, prompts, None)
    assert [answer.ids for answer in sampled] == [row[row != -100].tolist() for row in labels]
    ours = {**supervised_batch(prompts, sampled, 0), SAMPLED: torch.ones(2, 1)}
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = [each(**inputs).logits for each in (model, teacher)]
        expected = gkd.generalized_jsd_loss(logits[0][:, :-1], logits[1][:, :-1], labels[:, 1:], beta=beta)
        found = made.training_objective.loss(model, ours, None, False)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sampled_tokens_have_no_cross_entropy(tmp_path: Path) -> None:
    model = adapted().eval()
    made = trainer(model, tmp_path, distillation=Distillation(weight=0.5, nll_weight=2.0))
    batch = RightPaddingCollator(0)(chats(4))
    with torch.no_grad():
        nll, divergences, _ = made.training_objective.token_parts(model, dict(batch))
        marked = batch | {SAMPLED: torch.tensor([[1.0], [0.0], [1.0], [0.0]])}
        some, same, mask = made.training_objective.token_parts(model, dict(marked))
    rows = mask.nonzero()[:, 0]
    assert same.equal(divergences)
    assert some[rows % 2 == 0].eq(0).all() and some[rows % 2 == 1].equal(nll[rows % 2 == 1])


def test_a_share_of_the_batches_is_sampled_and_the_others_keep_their_rows(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path, on_policy=OnPolicy([3], 0.4, SAMPLING))
    batch, policy = RightPaddingCollator(0)(chats(2)), made.training_objective.on_policy
    assert policy is not None
    parts = policy.sampled(made, [batch] * 60)
    sampled = [part for part in parts if part[SAMPLED].all()]
    assert 12 <= len(sampled) <= 36
    for part in parts:
        if not part[SAMPLED].any():
            assert part["input_ids"] is batch["input_ids"] and part["labels"] is batch["labels"]
        assert prompts_of(part) == prompts_of(batch)
    assert len({str(part["input_ids"].tolist()) for part in sampled}) > len(sampled) // 2


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    straight, resumed = (
        trainer(adapted(lora_dropout=0.2), tmp_path / name, on_policy=OnPolicy([3], 0.5, SAMPLING), **options)
        for name in ("a", "b")
    )
    straight.train()
    torch.rand(7)  # another process has drawn other numbers
    random.random()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    logs = [[record for record in made.state.log_history if "loss" in record] for made in (straight, resumed)]
    assert logs[0] == logs[1]
    for name, tensor in trained(straight.model).items():
        assert torch.equal(tensor, trained(resumed.model)[name]), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="share must be above 0 and at most 1; got 0"):
        OnPolicy([3], 0)
    with pytest.raises(ConfigError, match="end_tokens is empty"):
        OnPolicy([])
    with pytest.raises(TrainingError, match="packed rows have no bounds"):
        trainer(adapted(), tmp_path, data_collator=PackedCollator())
