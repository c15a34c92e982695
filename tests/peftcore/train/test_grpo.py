"""GRPO's advantages and loss: the paper's formulas in float64, their gradients, and clipping."""

import math
import statistics
from typing import Any

import pytest
import torch

from peftcore import ConfigError
from peftcore.train import Grpo

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.3, 0.9, 0.1, 0.4], [2.0, 2.0, 2.0, 2.0]]
LOG_PROBS, OLD = [-1.0, -0.3, -2.0, -1.1], [-1.4, -0.2, -1.9, -0.4]
REFERENCE, ADVANTAGES = [-1.2, -0.5, -1.5, -1.1], [1.5, -0.7, 0.4, -1.2]


def doubles(values: Any, requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_rewards_less_the_mean_of_their_group(scale: Any) -> None:
    found = Grpo(scale_rewards=scale).advantages(doubles(REWARDS)).tolist()
    every = [reward for group in REWARDS for reward in group]
    for group, row in zip(REWARDS, found, strict=True):
        deviation = {"group": statistics.stdev(group), "batch": statistics.stdev(every), "none": None}[scale]
        divisor = 1.0 if deviation is None else deviation + 1e-4
        assert row == pytest.approx([(reward - statistics.mean(group)) / divisor for reward in group], rel=1e-12)


def test_a_deviation_of_several_batches_is_used() -> None:
    found = Grpo(scale_rewards="batch").advantages(doubles(REWARDS), doubles(0.5))
    assert found[0].tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001])


@pytest.mark.parametrize("corrected", [True, False])
def test_losses_are_the_papers_formula(corrected: bool) -> None:
    grpo = Grpo(beta=0.3, epsilon=0.2, epsilon_high=0.28, use_bias_correction_kl=corrected)
    losses, divergences = grpo.token_losses(doubles(LOG_PROBS), doubles(OLD), doubles(ADVANTAGES), doubles(REFERENCE))
    expected, kl = [], []
    for policy, old, reference, advantage in zip(LOG_PROBS, OLD, REFERENCE, ADVANTAGES, strict=True):
        ratio = math.exp(policy - old)
        kl.append(math.exp(reference - policy) - (reference - policy) - 1)
        kl[-1] *= ratio if corrected else 1
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        expected.append(-surrogate + 0.3 * kl[-1])
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert divergences.tolist() == pytest.approx(kl, rel=1e-12)


def test_clipping_ends_the_gradient_where_the_ratio_has_moved_far_in_the_right_direction() -> None:
    grpo = Grpo(epsilon=0.2)
    log_probs = doubles(LOG_PROBS, requires_grad=True)
    losses, divergences = grpo.token_losses(log_probs, doubles(OLD), doubles(ADVANTAGES))
    losses.sum().backward()
    assert log_probs.grad is not None and divergences.tolist() == [0.0] * 4
    ratios = [math.exp(policy - old) for policy, old in zip(LOG_PROBS, OLD, strict=True)]
    # 1.49 with a positive and 0.50 with a negative advantage are clipped
    expected = [0.0, -ratios[1] * ADVANTAGES[1], -ratios[2] * ADVANTAGES[2], 0.0]
    assert log_probs.grad.tolist() == pytest.approx(expected, rel=1e-12)
    clipped = grpo.clipped(doubles(LOG_PROBS), doubles(OLD), doubles(ADVANTAGES))
    assert clipped.tolist() == [True, False, False, True]


def test_the_corrected_divergence_has_the_gradient_of_kl() -> None:
    """The mean gradient over answers of the policy is that of KL(π ‖ ρ) only with the factor."""
    logits, other = doubles([0.2, -1.0, 0.7], requires_grad=True), doubles([0.9, 0.1, -0.4])
    log_p, log_q = logits.log_softmax(0), other.log_softmax(0)
    exact = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)[0]
    differences = {}
    for corrected in (True, False):
        grpo = Grpo(beta=1.0, use_bias_correction_kl=corrected)
        losses, _ = grpo.token_losses(log_p, log_p.detach(), torch.zeros(3), log_q)
        mean = (log_p.detach().exp() * losses).sum()
        found = torch.autograd.grad(mean, logits, retain_graph=True)[0]
        differences[corrected] = (found - exact).abs().max().item()
    assert differences[True] < 1e-12 and differences[False] > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2; got 1"),
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
        ({"beta": -0.1}, "beta must be at least 0; got -0.1"),
        ({"beta": math.nan}, "beta must be at least 0; got nan"),
        ({"epsilon": 1.0}, "epsilon must be above 0 and below 1; got 1.0"),
        ({"epsilon_high": 0.0}, "epsilon_high must be above 0; got 0.0"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, dr_grpo, bnpo; got 'ppo'"),
        ({"scale_rewards": "all"}, "scale_rewards must be one of group, batch, none; got 'all'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grpo(**options)
