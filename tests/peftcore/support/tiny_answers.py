"""Single answers with a mark, and a trainer of them, for tests of KTO."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from quiet_training import quiet_arguments, without_printing
from tiny_pairs import pairs

from peftcore.train import KtoTrainer, UnpairedPreferenceCollator


def answers(count: int, weights: list[float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of answers to different prompts, of which two of three are desirable."""
    rows = [
        {"input_ids": pair["chosen_input_ids"], "labels": pair["chosen_labels"], "desirable": number % 3 != 1}
        for number, pair in enumerate(pairs(count, seed=seed))
    ]
    return rows if weights is None else [row | {"weight": w} for row, w in zip(rows, weights, strict=True)]


def trainer(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> KtoTrainer:
    """A quiet trainer of answers; options: of KtoTrainer where it takes them, else training arguments."""
    names = ("objective", "reference", "ref_adapter_name", "callbacks", "data_collator", "faults")
    own: dict[str, Any] = {"reference": "base"} | {name: options.pop(name) for name in names if name in options}
    steps: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    made = KtoTrainer(
        model=model,
        args=quiet_arguments(folder, **(steps | options)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(answers(5, seed=1)),
        **({"data_collator": UnpairedPreferenceCollator(0)} | own),
    )
    return without_printing(made)
