"""Weighted rows: the loss is Σ w ℓ / Σ w n over the whole accumulated batch, and plain where there are no weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from quiet_training import quiet_arguments, trained, without_printing
from tiny_pairs import adapted, log_prob, pairs
from torch import Tensor

from peftcore import TrainingError
from peftcore.train import AdapterTrainer, PackedCollator, Packs, RightPaddingCollator

WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.5, 1.0]


def rows(weights: list[float] | None) -> list[dict[str, Any]]:
    made = [{"input_ids": r["chosen_input_ids"], "labels": r["chosen_labels"]} for r in pairs(8)]
    return made if weights is None else [r | {"weight": w} for r, w in zip(made, weights, strict=True)]


def trainer(folder: Path, data: Any, model: Any = None, collate: Any = None, **options: Any) -> AdapterTrainer:
    step: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 8, "prediction_loss_only": True}
    step |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    made = AdapterTrainer(
        model=adapted().double() if model is None else model,
        args=quiet_arguments(folder, **(step | options)),
        train_dataset=data,
        eval_dataset=data if isinstance(data, Dataset) else None,
        data_collator=collate or RightPaddingCollator(0),
    )
    return without_printing(made)


def by_hand(model: Any, data: list[dict[str, Any]]) -> Tensor:
    losses = torch.stack([-log_prob(model, row["input_ids"], row["labels"]) for row in data])
    weights = torch.tensor([row.get("weight", 1.0) for row in data], dtype=torch.float64)
    tokens = torch.tensor([sum(label != -100 for label in row["labels"]) for row in data])
    return (weights * losses).sum() / (weights * tokens).sum()


def step_by_hand(data: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    model = adapted().double()
    loss = by_hand(model, data)
    loss.backward()
    return loss.item(), {n: p.detach() - p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("batching", "accumulation"),
    [("padded", 1), ("padded", 4), ("padding_free", 1), ("padding_free", 4), ("packed", None)],
)
def test_a_step_is_that_of_the_formula_whatever_the_batches(
    tmp_path: Path, batching: str, accumulation: int | None
) -> None:
    data = rows(WEIGHTS)
    expected, weights = step_by_hand(data)
    given: Any = Dataset.from_list(data) if accumulation else Packs(data, 24)
    options = {
        "per_device_train_batch_size": 8 // accumulation if accumulation else 1,
        "gradient_accumulation_steps": accumulation or len(given),
    }
    made = trainer(tmp_path, given, collate=None if batching == "padded" else PackedCollator(), **options)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)  # logged in float32
    for name, tensor in trained(made.model).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-8)


def test_weights_of_one_and_no_weights_are_the_same_training(tmp_path: Path) -> None:
    one, none = (trainer(tmp_path, Dataset.from_list(rows(w)), max_steps=3) for w in ([1.0] * 8, None))
    one.train()
    none.train()
    for name, tensor in trained(one.model).items():
        torch.testing.assert_close(tensor, trained(none.model)[name], rtol=1e-9, atol=1e-12)
    assert "weight" not in RightPaddingCollator(0)(rows(None)) and "weight" not in PackedCollator()(rows(None))


@pytest.mark.parametrize("collate", [RightPaddingCollator(0), PackedCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_rows_without_a_weight_among_others_weigh_one(tmp_path: Path, accumulation: int, collate: Any) -> None:
    data = [row | ({"weight": 0.0} if number in (1, 2) else {}) for number, row in enumerate(rows(None))]
    expected, weights = step_by_hand(data)
    for given in (data, Dataset.from_list([data[1], *data]).select(range(1, 9))):  # missing, and None
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        made = trainer(tmp_path, given, collate=collate, train_sampling_strategy="sequential", **options)
        made.train()
        assert made.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
        for name, tensor in trained(made.model).items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-8)
        assert made.evaluate(given)["eval_loss"] == pytest.approx(by_hand(made.model.eval(), data).item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_weighs_as_training_does(tmp_path: Path, batch_size: int) -> None:
    data, model = rows(WEIGHTS), adapted().double().eval()
    made = trainer(tmp_path, Dataset.from_list(data), model=model, per_device_eval_batch_size=batch_size)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(by_hand(model, data).item(), rel=1e-6)
    assert metrics["eval_tokens"] == sum(label != -100 for row in data for label in row["labels"])


def test_a_loss_that_cannot_weigh_rows_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, Dataset.from_list(rows(WEIGHTS)), label_smoothing_factor=0.1)
    with pytest.raises(TrainingError, match=r"rows have weights, but .*no additional loss terms, no label smoothing"):
        made.train()
    seen = trainer(tmp_path, Dataset.from_list(rows(WEIGHTS)), prediction_loss_only=False)
    with pytest.raises(TrainingError, match="prediction_loss_only=True"):
        seen.predict(seen.eval_dataset)
