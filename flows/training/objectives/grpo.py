"""grpo: rewards of answers that the model generates to the prompts of chats, `peftcore.train.grpo`."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from flows.data.rows import Row
from flows.params import Params
from flows.training.objectives.objective import Objective, Rows, Trainer
from peftcore import TaskType
from peftcore.train import Grpo, GrpoTrainer, PromptCollator, Sampling


class GroupRelativePolicy(Objective):
    """Objective of prompts whose answers get rewards."""

    rows = Rows("chat", ("input_ids", "labels"), ("input_ids",), TaskType.CAUSAL_LM)

    def columns(self, present: Sequence[str]) -> list[str]:
        """Return all columns but the labels, because a reward may read any."""
        return [name for name in present if name != "labels"]

    def training_rows(self, rows: list[Row]) -> list[Row]:
        """Return the rows with the prompt's tokens alone."""
        return [row | {"input_ids": row["input_ids"][: row["prompt_length"]]} for row in rows]

    def collator(self, pad: int, longest_row: int) -> Any:
        """Return the collator of prompts."""
        return PromptCollator()

    def new_tokens(self, params: Params) -> int:
        """Return the maximum tokens of an answer."""
        return params.train.grpo.max_new_tokens

    def start_rows(self, rows: Dataset) -> Dataset:
        """Return the prompts with their own tokens as labels."""
        return rows.select_columns(["input_ids"]).add_column("labels", rows["input_ids"][:])

    def loss_function(self, params: Params) -> str:
        """Return a description of the test loss."""
        return "cross entropy of tokens"

    def trainer(self, params: Params, rows: Dataset, labels: list[str] | None, teacher: Any) -> Trainer:
        """Return the trainer and its arguments; the train stage adds the rewards and the tokenizer."""
        options = params.train.grpo
        loss = options.model_dump(exclude={"rewards", "max_new_tokens", "temperature", "top_p"})
        return GrpoTrainer, {
            "objective": Grpo(**loss),
            "sampling": Sampling(options.max_new_tokens, options.temperature, options.top_p),
            "reward_weights": {reward.name: reward.weight for reward in options.rewards},
            "reference": "base",
        }
