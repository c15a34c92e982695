"""python trainers_on_device.py BUILD_FOLDER: the trainers on the second device."""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_answers
import tiny_pairs
import tiny_prompts
import tiny_training
import torch
from accelerate import PartialState
from datasets import Dataset
from quiet_training import quiet_arguments, tiny_llama
from second_device import DEVICE, Checks, check_on_device, register
from tiny_pairs import adapted
from transformers import TrainingArguments

from peftcore.train import (
    Distillation,
    DistillationTrainer,
    Grpo,
    OnPolicy,
    PackedCollator,
    Packs,
    RightPaddingCollator,
    Sampling,
)

WEIGHTS = [1.0, 0.5, 0.0, 2.0]


def take_device() -> None:
    """Let accelerate and Trainer choose the device, as they choose a GPU."""
    PartialState.set_device = lambda self: setattr(self, "device", DEVICE)  # type: ignore[method-assign]
    TrainingArguments.device = property(lambda self: self._setup_devices and DEVICE)  # type: ignore[assignment]


def grpo(folder: Path, **options: Any) -> Any:
    rows = [row | {"weight": WEIGHTS[number % 4]} for number, row in enumerate(tiny_prompts.prompts(8))]
    return tiny_prompts.trainer(adapted(), folder, rows, objective=Grpo(group_size=3, beta=0.1, **options))


def distillation(folder: Path) -> Any:
    """A teacher, and answers of the student for half of the batches."""
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in tiny_answers.answers(8)]
    return DistillationTrainer(
        model=adapted(),
        args=quiet_arguments(folder, max_steps=3, per_device_train_batch_size=2, prediction_loss_only=True),
        train_dataset=Dataset.from_list([row | {"weight": WEIGHTS[n % 4]} for n, row in enumerate(rows)]),
        data_collator=RightPaddingCollator(0),
        teacher=tiny_llama(),
        distillation=Distillation(),
        on_policy=OnPolicy([3], 0.5, Sampling(max_new_tokens=5)),
    )


TRAINERS: dict[str, Callable[[Path], Any]] = {
    "rows": lambda folder: tiny_training.trainer(tiny_training.adapted(dropout=0.1), folder),
    "AdaLoRA": lambda folder: tiny_training.trainer(tiny_training.adapted("adalora"), folder),
    "packs": lambda folder: tiny_training.trainer(
        tiny_training.adapted(), folder, Packs(tiny_training.rows(40), 48), data_collator=PackedCollator()
    ),
    "transformers' Trainer": lambda folder: tiny_training.plain(tiny_training.adapted(), folder),
    "DPO": lambda folder: tiny_pairs.trainer(adapted(), folder, tiny_pairs.pairs(4, WEIGHTS)),
    "DPO, reference computed before": lambda folder: tiny_pairs.trainer(
        adapted(), folder, tiny_pairs.pairs(4), precompute_reference=True
    ),
    "KTO": lambda folder: tiny_answers.trainer(adapted(), folder, tiny_answers.answers(4, WEIGHTS)),
    **{f"GRPO, {loss}": lambda folder, loss=loss: grpo(folder, loss_type=loss) for loss in ("grpo", "bnpo", "dr_grpo")},
    "GRPO, batch": lambda folder: grpo(folder, scale_rewards="batch"),
    "GRPO, two iterations": lambda folder: grpo(folder, iterations=2),
    "distillation": distillation,
}


def check(make: Callable[[Path], Any]) -> None:
    """Train, and evaluate where there is a set for it; the trainer moves the model."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder))
        trainer.train()
        check_on_device(trainer.model)
        if trainer.eval_dataset is not None:
            trainer.evaluate()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    register(Path(sys.argv[1]))
    take_device()
    checks = Checks()
    for name, make in TRAINERS.items():
        torch.manual_seed(0)
        checks.step(name, lambda make=make: check(make))
    checks.finish()
