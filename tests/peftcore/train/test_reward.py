"""The loss of reward models: its value and its gradient, and models that are no reward models."""

import math
from typing import Any

import pytest
import torch
from quiet_training import tiny_llama
from torch import tensor

from peftcore import ConfigError, TrainingError
from peftcore.train import BradleyTerry, pair_rewards, sequence_rewards

F64: dict[str, Any] = {"dtype": torch.float64}


def test_the_loss_is_that_of_a_choice_between_two_answers_by_their_rewards() -> None:
    chosen, rejected = tensor([2.0, -1.0, 0.0], **F64), tensor([0.0, 1.0, 0.0], **F64)
    wins = chosen.exp() / (chosen.exp() + rejected.exp())
    torch.testing.assert_close(BradleyTerry().losses(chosen, rejected), -wins.log())
    assert BradleyTerry().losses(chosen, rejected)[2].item() == pytest.approx(math.log(2))


def test_a_margin_has_to_be_won_by_and_a_coefficient_draws_the_sum_to_zero() -> None:
    chosen, rejected, margins = tensor([2.0, 3.0], **F64), tensor([1.0, 5.0], **F64), tensor([0.5, 0.0], **F64)
    without = BradleyTerry().losses(chosen, rejected, margins)
    torch.testing.assert_close(without, BradleyTerry().losses(chosen - 0.5 * (margins > 0), rejected))
    centred = BradleyTerry(center_rewards_coefficient=0.01).losses(chosen, rejected, margins)
    torch.testing.assert_close(centred - without, tensor([0.09, 0.64], **F64))


def test_far_apart_rewards_have_finite_losses() -> None:
    losses = BradleyTerry().losses(tensor([300.0, -300.0]), tensor([-300.0, 300.0]))
    torch.testing.assert_close(losses, tensor([0.0, 600.0]))


@pytest.mark.parametrize("coefficient", [-0.1, math.nan])
def test_a_coefficient_below_zero_is_refused(coefficient: float) -> None:
    with pytest.raises(ConfigError, match="center_rewards_coefficient must be at least 0; got"):
        BradleyTerry(center_rewards_coefficient=coefficient)


def test_a_language_model_is_no_reward_model() -> None:
    ids = torch.ones(1, 2, 3, dtype=torch.long)
    with pytest.raises(TrainingError, match=r"shape \(2, 3, 50\) for 2 answers; .* num_labels=1"):
        pair_rewards(tiny_llama(), {"input_ids": ids, "attention_mask": ids})
    with pytest.raises(TrainingError, match=r"shape \(1, 3, 50\)"):
        sequence_rewards(tiny_llama(), ids[0, :1], ids[0, :1])
