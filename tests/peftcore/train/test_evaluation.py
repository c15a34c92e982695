"""An evaluation's loss is the mean over the tokens of the set, and no logits are kept."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from datasets import Dataset
from quiet_training import losses
from tiny_training import adapted, rows
from torch.nn import functional as F

from peftcore import TrainingError
from peftcore.train import AdapterTrainer

pytestmark = pytest.mark.filterwarnings(
    # the deprecation is inside transformers' own scheduler set-up
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)


def trainer(model: Any, folder: Path, data: Dataset | None = None, **options: Any) -> AdapterTrainer:
    """Eight steps of four rows of like length."""
    grouped = {"train_sampling_strategy": "group_by_length", "logging_nan_inf_filter": True}
    return tiny_training.trainer(model, folder, rows(16) if data is None else data, **(grouped | options))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_is_the_mean_over_tokens_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    model = adapted().double()
    data = rows(9, seed=1)
    total = tokens = 0.0
    model.eval()
    for row in data:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    made = trainer(model, tmp_path, per_device_eval_batch_size=batch_size)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-12)
    assert metrics["eval_tokens"] == tokens


def test_evaluation_keeps_no_logits_and_leaves_training_where_it_was(tmp_path: Path) -> None:
    without = trainer(adapted(dropout=0.2), tmp_path / "a")
    without.train()
    with_evaluation = trainer(adapted(dropout=0.2), tmp_path / "b", eval_strategy="steps", eval_steps=1)
    with_evaluation.train()
    assert losses(without) == losses(with_evaluation)
    output = with_evaluation.evaluation_loop(
        with_evaluation.get_eval_dataloader(), "Evaluation", prediction_loss_only=True
    )
    assert output.predictions is None and output.num_samples == 9


def test_an_evaluation_set_without_supervision_is_an_error(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path)
    made.eval_dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]})
    with pytest.raises(TrainingError, match="no supervised token"):
        made.evaluate()
