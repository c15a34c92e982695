"""The regulariser is added once per optimiser step, and logged apart from the loss."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from datasets import Dataset
from quiet_training import losses, trained
from tiny_training import adapted, rows

from peftcore.train import AdapterTrainer, RightPaddingCollator

pytestmark = pytest.mark.filterwarnings(
    # the deprecation is inside transformers' own scheduler set-up
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)


def trainer(model: Any, folder: Path, data: Dataset | None = None, **options: Any) -> AdapterTrainer:
    """Eight steps of four rows of like length."""
    grouped = {"train_sampling_strategy": "group_by_length", "logging_nan_inf_filter": True}
    return tiny_training.trainer(model, folder, rows(16) if data is None else data, **(grouped | options))


def test_the_regulariser_counts_once_a_step_whatever_the_accumulation(tmp_path: Path) -> None:
    whole, parts = adapted("adalora").double(), adapted("adalora").double()
    big = trainer(whole, tmp_path / "a", rows(8), per_device_train_batch_size=8, max_steps=1)
    small = trainer(
        parts,
        tmp_path / "b",
        rows(8),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    expected = whole.adapter_regularizer().item()
    big.train()
    small.train()
    for made in (big, small):
        assert made.state.log_history[0]["regularizer"] == pytest.approx(expected, rel=1e-6)
    assert losses(big) == pytest.approx(losses(small), abs=1e-4)
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(tensor, trained(parts)[name], rtol=1e-6, atol=1e-8)


def test_the_regulariser_reaches_the_gradient(tmp_path: Path) -> None:
    gradients = {}
    for weight in (0.0, 0.5):
        model = adapted("adalora")
        model.peft_config["default"].orth_reg_weight = weight
        made = trainer(model, tmp_path / str(weight), rows(4))
        made.current_gradient_accumulation_steps = 1
        made.accelerator.gradient_state._set_sync_gradients(True)
        batch = RightPaddingCollator(0)(list(rows(4)))
        made.training_step(model.train(), batch, (batch["labels"] != -100).sum())
        gradients[weight] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model = adapted("adalora")
    model.peft_config["default"].orth_reg_weight = 0.5
    model.adapter_regularizer().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            difference = gradients[0.5][name] - gradients[0.0][name]
            torch.testing.assert_close(difference, parameter.grad, rtol=1e-4, atol=1e-5)
