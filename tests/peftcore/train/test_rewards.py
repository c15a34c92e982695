"""Weighted sums of rewards, and errors that name the reward and the row."""

import math
from typing import Any

import pytest
import torch

from peftcore import ConfigError, TrainingError
from peftcore.train import Rewards
from peftcore.train.rewards import row_name


def words(row: Any, answer: str) -> int:
    return len(answer.split())


def right(row: Any, answer: str) -> bool:
    return answer == row["completion"]


def test_the_total_is_the_weighted_sum() -> None:
    rewards = Rewards({"words": words, "right": right}, {"words": -0.5})
    values = rewards.values([{"completion": "a b"}, {"completion": "a"}], ["a b", "c d e"])
    assert values.tolist() == [[2.0, 1.0], [3.0, 0.0]] and values.dtype == torch.float64
    assert rewards.total(values).tolist() == [0.0, -1.5]


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", None, [1.0]])
def test_a_value_that_is_no_finite_number_is_refused(value: Any) -> None:
    rewards = Rewards({"words": words, "odd": lambda row, answer: value})
    with pytest.raises(TrainingError, match=r"the reward odd returned .* on row r7 with the answer 'a b'; it must"):
        rewards.values([{"id": "r7"}], ["a b"])


def test_an_error_names_reward_and_row() -> None:
    with pytest.raises(TrainingError, match=r"the reward right failed on row r7 .*KeyError: 'completion'; mend it"):
        Rewards({"right": right}).values([{"id": "r7"}], ["a b"])


def test_a_row_without_an_id_is_named_by_its_prompt_or_tokens() -> None:
    assert row_name({"id": "r7", "prompt": "Why?"}) == "r7"
    assert row_name({"prompt": "Why?"}) == "Why?" and row_name({"input_ids": [5, 6]}) == "[5, 6]"


def test_weights_belong_to_rewards_and_are_finite() -> None:
    with pytest.raises(ConfigError, match="no reward is given"):
        Rewards({})
    with pytest.raises(ConfigError, match=r"'word', which does not exist; did you mean words\?"):
        Rewards({"words": words}, {"word": 1.0})
    with pytest.raises(ConfigError, match="'zzz', which does not exist; there are words"):
        Rewards({"words": words}, {"zzz": 1.0})
    with pytest.raises(ConfigError, match="the weight of the reward 'words' must be finite; got nan"):
        Rewards({"words": words}, {"words": math.nan})
