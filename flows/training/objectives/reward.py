"""reward: Bradley-Terry loss of a reward model on preference pairs, `peftcore.train.reward`."""

from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import (
    MARGIN,
    REWARD_COLUMNS,
    BradleyTerry,
    ClassificationCollator,
    RewardCollator,
    RewardTrainer,
    RightPaddingCollator,
)

REWARD = "reward"
"""The objective, and the name of the model's only output."""


class Reward(Objective):
    """Objective of preference pairs, for a sequence classifier with one output."""

    rows = Rows("preference", REWARD_COLUMNS, REWARD_COLUMNS, TaskType.SEQ_CLS)
    optional_columns = (MARGIN,)
    outputs = (REWARD,)

    def collator(self, pad: int, longest_row: int) -> RightPaddingCollator:
        """Return the padding collator of these rows."""
        return RewardCollator(pad)

    def start_batch(self, rows: list[Row], pad: int) -> dict[str, Any]:
        """Return the chosen answers as the forward's arguments, without labels."""
        batch = ClassificationCollator(pad)([{"input_ids": row["chosen_input_ids"], "label": 0} for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss_function(self, params: Params) -> str:
        """Return a description of the loss."""
        return repr(reward_objective(params))

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments."""
        return RewardTrainer, {"objective": reward_objective(params)}


def reward_objective(params: Params) -> BradleyTerry:
    """Return the loss of reward models of the parameters."""
    return BradleyTerry(params.train.reward.center_rewards_coefficient)
