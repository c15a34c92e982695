"""A Trainer for reward models: chosen and rejected answers of a pair in one forward of a sequence classifier.

Every pair has the same weight (or its own), whatever the gradient accumulation. Logged under TRL's names: `accuracy`,
`margin` and `mean_reward`.

Shapes: P pairs, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from peftcore.errors import TrainingError
from peftcore.train.batches import WEIGHT, LengthGroupedSampler, RightPaddingCollator, row_weights
from peftcore.train.example_objective import ExampleObjective
from peftcore.train.reward import BradleyTerry, pair_rewards
from peftcore.train.trainer import AdapterTrainerMixin

REWARD_COLUMNS = ("chosen_input_ids", "rejected_input_ids")
"""Columns of a pair: token ids of both answers, each behind the prompt."""
MARGIN = "margin"
"""Column of a dataset and key of a batch: by how much the chosen answer is better than the rejected one."""


class RewardCollator(RightPaddingCollator):
    """Collator of P pairs {"chosen_input_ids", "rejected_input_ids"} into tensors (P, 2, T), the chosen answer first.

    Rows may have a "weight" (1 by default) and a "margin" (0 by default).
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (P, 2, T), `weight` (P,), and `margin` (P,) if a row has one.

        `labels` (P,) are 0, the place of the chosen answer in its pair.
        """
        sides = [{"input_ids": row[column], "labels": []} for row in rows for column in REWARD_COLUMNS]
        padded = self._padded(sides)
        batch = {name: padded[name].unflatten(0, (len(rows), 2)) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.zeros(len(rows), dtype=torch.long)
        batch[WEIGHT] = row_weights(rows)
        if any(row.get(MARGIN) is not None for row in rows):
            batch[MARGIN] = torch.tensor([row.get(MARGIN) or 0.0 for row in rows], dtype=torch.float32)
        return batch


class RewardObjective(ExampleObjective):
    """Weighted mean of the Bradley-Terry loss over pairs.

    Args:
        trainer: The trainer that minimises this objective.
        pair_loss: The loss of a pair.
    """

    collator_name = "RewardCollator"

    def __init__(self, trainer: Any, pair_loss: BradleyTerry) -> None:
        super().__init__(trainer)
        self.pair_loss = pair_loss

    def columns(self, signature: list[str]) -> list[str]:
        """Return the columns of the dataset that the loss reads, whatever the model's signature."""
        return [*REWARD_COLUMNS, MARGIN, WEIGHT]

    def lengths(self, dataset: Any) -> list[int]:
        """Return the tokens of both answers, prompts included, of each pair."""
        return [sum(len(row[column]) for column in REWARD_COLUMNS) for row in dataset]

    def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses of the pairs, (P,), and their accuracies (a tie is wrong), margins and mean rewards."""
        if inputs["input_ids"].dim() != 3:
            raise TrainingError(
                f"the batch's input_ids have the shape {tuple(inputs['input_ids'].shape)}, and pairs have (pairs, 2, "
                f"tokens); give data_collator={self.collator_name}(pad_token_id)"
            )
        chosen, rejected = pair_rewards(model, inputs)
        margins = inputs[MARGIN].to(chosen) if MARGIN in inputs else None
        metrics = {
            "accuracy": (chosen > rejected).to(chosen),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
        }
        losses = self.pair_loss.losses(chosen, rejected, margins)
        return losses, {name: values.detach() for name, values in metrics.items()}


class RewardTrainerMixin(AdapterTrainerMixin):
    """Training of reward models for any Trainer class: `class MyTrainer(RewardTrainerMixin, Trainer): ...`.

    The model is a sequence classifier with one output, and the collator a RewardCollator. An adapter with
    `task_type=TaskType.SEQ_CLS` trains the new head and saves it. The arguments are those of AdapterTrainerMixin and:

    Args:
        objective: The loss of a pair. None: `BradleyTerry()`.

    Raises:
        TrainingError: The model does not have one output for each sequence, or the rows are packed.
    """

    loss_is_scaled_for_ga = True
    training_objective: RewardObjective

    def __init__(self, *args: Any, objective: BradleyTerry | None = None, **kwargs: Any) -> None:
        self._pair_loss = BradleyTerry() if objective is None else objective
        super().__init__(*args, **kwargs)

    def make_objective(self) -> RewardObjective:
        """Return the objective that minimises the weighted mean of the pairs' losses."""
        return RewardObjective(self, self._pair_loss)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self.groups_by_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(self.training_objective.lengths(eval_dataset), self.args.eval_batch_size)


class RewardTrainer(RewardTrainerMixin, Trainer):
    """transformers' Trainer for a PeftModel over a sequence classifier, and preference pairs."""
