"""Best-of-n sampling: of n sampled answers the one with the highest reward, and what a larger n is worth.

The mean reward of the best of k answers is estimated from n ≥ k answers, over all choices of k of them:

    E[max of k] = Σ_i C(i − 1, k − 1) / C(n, k) r_(i),    r_(1) ≤ ... ≤ r_(n)

This estimator has no bias and less variance than the maximum of the first k answers. Best-of-n moves the distribution
of answers away from the model by a KL divergence of at most log n − (n − 1)/n nats (arXiv:2112.09332, section 3.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcore.errors import TrainingError
from peftcore.train.reward_model import RewardModel

Reward = Callable[[str, str, Mapping[str, Any]], float]
"""Function of (prompt, answer, row) that returns a number, higher for a better answer, such as a RewardModel."""


@dataclass(frozen=True)
class Candidates:
    """Sampled answers to one prompt, and the reward of each."""

    prompt: str
    answers: list[str]
    rewards: list[float]

    @property
    def best(self) -> str:
        """The answer with the highest reward; the first of several."""
        return self.answers[self.rewards.index(max(self.rewards))]


def best_of_n(
    prompts: Sequence[str],
    sample: Callable[[Sequence[str]], Sequence[str]],
    reward: Reward,
    n: int,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[Candidates]:
    """Sample n answers to each prompt, and return them with their rewards.

    Args:
        prompts: Texts as the model sees them, up to the answer.
        sample: Function that answers each of the given prompts once; it gets each prompt n times.
        reward: The reward. A RewardModel scores answers in batches, other functions one at a time.
        n: Answers to each prompt.
        rows: The row of each prompt, for `reward`. None: empty rows.

    Raises:
        TrainingError: n is below 1, `sample` returns another number of answers, or a reward is not finite.
    """
    if n < 1:
        raise TrainingError(f"n is {n}; give the number of answers to each prompt, 1 or more")
    repeated = [prompt for prompt in prompts for _ in range(n)]
    answers = list(sample(repeated))
    if len(answers) != len(repeated):
        raise TrainingError(f"sample returned {len(answers)} answers to {len(repeated)} prompts; return one for each")
    if isinstance(reward, RewardModel):
        rewards = reward.rewards(repeated, answers)
    else:
        sources = [row for row in ([{}] * len(prompts) if rows is None else rows) for _ in range(n)]
        rewards = [float(reward(*each)) for each in zip(repeated, answers, sources, strict=True)]
    for answer, value in zip(answers, rewards, strict=True):
        if not math.isfinite(value):
            raise TrainingError(f"the reward of the answer {answer[:80]!r} is {value}; a reward is a finite number")
    return [
        Candidates(prompt, answers[i * n : (i + 1) * n], rewards[i * n : (i + 1) * n])
        for i, prompt in enumerate(prompts)
    ]


def expected_best(
    rewards: Sequence[Sequence[float]], scores: Sequence[Sequence[float]] | None = None, k: int = 1
) -> float:
    """Return the mean over prompts of the score that the best of k answers has.

    Args:
        rewards: For each prompt the rewards of its n sampled answers, which choose the best.
        scores: The scores of the same answers. None: the rewards.
        k: Answers to choose from, 1 to n. With k = 1 it is the mean score.

    Raises:
        TrainingError: There is no prompt, or a prompt has fewer than k answers.
    """
    if not rewards or k < 1 or min(map(len, rewards)) < k:
        fewest = min(map(len, rewards)) if rewards else 0
        raise TrainingError(f"the best of {k} answers needs as many for each prompt; one has {fewest}")
    return sum(map(_expected_best, rewards, rewards if scores is None else scores, [k] * len(rewards))) / len(rewards)


def _expected_best(rewards: Sequence[float], scores: Sequence[float], k: int) -> float:
    total, n = 0.0, len(rewards)
    for value, score in zip(rewards, scores, strict=True):
        below, tied = sum(other < value for other in rewards), sum(other == value for other in rewards)
        # choices of k whose best has this reward, divided evenly among the answers that have it
        choices = math.comb(below + tied, k) - math.comb(below, k)
        total += score * choices / tied
    return total / math.comb(n, k)


def divergence_bound(n: int) -> float:
    """Return the largest KL divergence (nats) of best-of-n answers from the model's: log n − (n − 1)/n."""
    return math.log(n) - (n - 1) / n
