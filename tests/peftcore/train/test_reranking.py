"""Training of rerankers: losses by their formulas, rows of different lengths, and resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quiet_training import DieAt, Stop, assert_same, losses, quiet_arguments, trained, without_printing
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from peftcore import ConfigError, LoraConfig, TaskType, TrainingError, get_peft_model
from peftcore.train import RerankingCollator, RerankingTrainer, passage_scores, reranking_losses


def adapted(labels: int = 1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=labels, **sizes, **dropout))
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS))


def rows(count: int) -> list[dict[str, Any]]:
    """Query n fits the passage n; rows have 2 or 3 passages of different lengths."""
    result = []
    for n in range(count):
        passages = [[10 + n, 3], [10 + (n + 1) % count, 3, 4], [10 + (n + 2) % count]][: 2 + n % 2]
        pairs = [[2, 10 + n, 1, *passage] for passage in passages]
        types = [[0, 0, 0, *[1] * len(passage)] for passage in passages]
        result.append({"pairs_input_ids": pairs, "pairs_token_type_ids": types})
    return result


def trainer(folder: Path, model: Any, dataset: Any, *callbacks: Any, **options: Any) -> RerankingTrainer:
    own = {name: options.pop(name) for name in ("ranking_loss", "eval_dataset") if name in options}
    arguments = quiet_arguments(folder, **options)
    return without_printing(
        RerankingTrainer(
            model=model, args=arguments, train_dataset=dataset, callbacks=[*callbacks],
            data_collator=RerankingCollator(0), **own,
        )
    )  # fmt: skip


def test_the_collators_padding_token_changes_no_score_of_a_decoder() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=60, num_labels=1, pad_token_id=1, **sizes)).eval()
    data = [{"pairs_input_ids": row["pairs_input_ids"]} for row in rows(3)]
    for row in data:
        row["pairs_input_ids"] = [[5 if token == 1 else token for token in ids] for ids in row["pairs_input_ids"]]
    with torch.no_grad():
        expected, scores = (passage_scores(model, RerankingCollator(pad)(data)) for pad in (1, 0))
    torch.testing.assert_close(scores, expected)


def scores_by_hand(model: Any, row: dict[str, Any]) -> torch.Tensor:
    pairs = zip(row["pairs_input_ids"], row["pairs_token_type_ids"], strict=True)
    return torch.stack([model(torch.tensor([ids]), token_type_ids=torch.tensor([t])).logits[0, 0] for ids, t in pairs])


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_a_batch_has_the_losses_of_its_pairs_one_by_one(tmp_path: Path, loss: Any) -> None:
    model, batch = adapted().eval(), rows(4)
    made = trainer(tmp_path, model, batch, ranking_loss=loss)
    expected = []
    for row in batch:
        scores = scores_by_hand(model, row)
        right = torch.tensor([1.0] + [0.0] * (len(scores) - 1))
        expected.append(
            F.cross_entropy(scores[None], torch.tensor([0]))
            if loss == "softmax"
            else F.binary_cross_entropy_with_logits(scores, right)
        )
    torch.testing.assert_close(made.compute_loss(model, made.data_collator(batch)), torch.stack(expected).mean())


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_absent_passages_have_neither_loss_nor_gradient(loss: Any) -> None:
    scores = torch.tensor([[0.3, -0.2, -torch.inf]], dtype=torch.float64, requires_grad=True)
    (value,) = reranking_losses(scores, loss)
    torch.testing.assert_close(value, reranking_losses(scores[:, :2], loss)[0])
    (gradient,) = torch.autograd.grad(value, scores)
    assert gradient.isfinite().all() and gradient[0, 2] == 0 and gradient[0, 0] < 0 < gradient[0, 1]


def test_training_puts_right_passages_first(tmp_path: Path) -> None:
    model, data = adapted(), rows(8)
    made = trainer(
        tmp_path, model, data, eval_dataset=data, num_train_epochs=20, per_device_train_batch_size=8,
        prediction_loss_only=True,
    )  # fmt: skip
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_recall_at_1"] >= before["eval_recall_at_1"] and after["eval_mrr_at_10"] > 0.9


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    straight = trainer(tmp_path / "a", adapted(), rows(8), **options)
    straight.train()
    with pytest.raises(Stop):
        trainer(tmp_path / "b", adapted(), rows(8), DieAt(3), **options).train()
    resumed = trainer(tmp_path / "b", adapted(), rows(8), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert_same(trained(resumed.model), trained(straight.model))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss must be one of softmax, binary; got 'hinge'"):
        reranking_losses(torch.zeros(1, 2), "hinge")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"logits of shape \(5, 2\) for 5 pairs.*num_labels=1"):
        passage_scores(adapted(labels=2), RerankingCollator(0)(rows(2)))
    made = trainer(tmp_path, adapted(), rows(2))
    batch = made.data_collator(rows(2))
    del batch["weight"]
    with pytest.raises(TrainingError, match="give data_collator=RerankingCollator"):
        made.compute_loss(made.model, batch)
