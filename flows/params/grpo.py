"""Section `train.grpo` of params.yaml: rewards of generated answers, sampling, and the options of the loss."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from flows.params.scorers import Scorer
from flows.params.section import Count, Finite, NonNegative, Positive, Section, invalid_value

TOTAL = "reward"
"""Name of the figure with the weighted sum of the rewards."""


class Reward(Scorer):
    """A scorer whose value is a reward, and its factor in the sum of the rewards."""

    section: ClassVar = "train.grpo.rewards"

    weight: Finite = 1.0

    @model_validator(mode="after")
    def _check_reward(self) -> Self:
        if self.name == TOTAL:
            raise invalid_value("the sum of the rewards has this name; give another one", "name", self.name)
        if self.on_error == "skip":
            expected = "an answer without a reward cannot be compared with its group; give stop, or a number"
            raise invalid_value(expected, "on_error", self.on_error)
        return self


class RewardSum(Scorer):
    """The weighted sum of rewards as a scorer, so that the evaluation has it as a column."""

    scorer: str = "weighted_sum"
    name: str = TOTAL
    rewards: list[Reward]

    @field_validator("scorer")
    @classmethod
    def _check_scorer(cls, scorer: str) -> str:
        return scorer

    def identity(self, root: Path) -> dict[str, Any]:
        """Return the values that decide the sums. root: the repository, with the files of the rewards."""
        return {"scorer": self.scorer, "rewards": reward_identities(self.rewards, root)}


class Grpo(Section):
    """Options of the objective grpo."""

    rewards: list[Reward] = Field(default=[])
    group_size: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: Count = 128
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    loss_type: Literal["grpo", "dr_grpo", "bnpo"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    beta: NonNegative = 0.04
    use_bias_correction_kl: bool = True
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: Positive | None = None
    iterations: Count = 1

    @model_validator(mode="after")
    def _check_reward_names(self) -> Self:
        names = [reward.name for reward in self.rewards]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise invalid_value("two rewards have this name; give another one", f"rewards.{index}.name", name)
        return self

    @property
    def scorers(self) -> list[Scorer]:
        """The rewards and their sum as scorers."""
        return [*self.rewards, RewardSum(rewards=self.rewards)]


def reward_identities(rewards: list[Reward], root: Path) -> dict[str, Any]:
    """Return {name: values that decide the reward}, the SHA-256 of its files among them. root: the repository."""
    return {reward.name: reward.identity(root) | {"weight": reward.weight} for reward in rewards}
