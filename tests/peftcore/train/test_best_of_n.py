"""Best-of-n: the answer with the highest reward, and the estimate of what more answers are worth."""

import itertools
import math
import random

import pytest

from peftcore import TrainingError
from peftcore.train import Candidates, best_of_n, divergence_bound, expected_best

REWARDS = [[0.5, -1.0, 2.0, 0.5, 1.0], [3.0, 3.0, -2.0, 0.0, 1.0]]
SCORES = [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 0.0, 0.0, 7.0]]


@pytest.mark.parametrize("k", range(1, 6))
def test_the_estimate_is_the_mean_over_all_choices_of_k_answers(k: int) -> None:
    maxima, chosen = [], []
    for rewards, scores in zip(REWARDS, SCORES, strict=True):
        choices = list(itertools.combinations(range(5), k))
        maxima.append(sum(max(rewards[i] for i in choice) for choice in choices) / len(choices))
        of_choices = []
        for choice in choices:
            best = max(rewards[i] for i in choice)
            tied = [scores[i] for i in range(5) if rewards[i] == best]  # a tie is broken by chance
            of_choices.append(sum(tied) / len(tied))
        chosen.append(sum(of_choices) / len(of_choices))
    assert expected_best(REWARDS, k=k) == pytest.approx(sum(maxima) / 2)
    assert expected_best(REWARDS, SCORES, k) == pytest.approx(sum(chosen) / 2)


def test_more_answers_are_never_worth_less() -> None:
    values = [expected_best(REWARDS, k=k) for k in range(1, 6)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(sum(map(sum, REWARDS)) / 10) and values[-1] == 2.5


def test_the_divergence_of_one_answer_is_none_and_grows() -> None:
    assert divergence_bound(1) == 0
    assert divergence_bound(8) == pytest.approx(math.log(8) - 7 / 8)


def test_each_prompt_is_answered_n_times_and_the_best_answer_is_kept() -> None:
    numbers = random.Random(0)
    asked: list[str] = []

    def sample(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return [f"{prompt}{numbers.randrange(100)}" for prompt in prompts]

    rows = [{"factor": 1.0}, {"factor": -1.0}]
    results = best_of_n(["a", "b"], sample, lambda prompt, answer, row: row["factor"] * int(answer[1:]), 4, rows)  # pyright: ignore[reportArgumentType]
    assert asked == ["a"] * 4 + ["b"] * 4
    assert [one.prompt for one in results] == ["a", "b"]
    values = [[int(answer[1:]) for answer in one.answers] for one in results]
    assert results[0].best == f"a{max(values[0])}" and results[1].best == f"b{min(values[1])}"


def test_of_equal_rewards_the_first_answer_is_the_best() -> None:
    assert Candidates("a", ["x", "y", "z"], [1.0, 2.0, 2.0]).best == "y"


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"the reward of the answer 'x' is nan; a reward is a finite number"):
        best_of_n(["a"], lambda prompts: ["x"] * len(prompts), lambda *_: math.nan, 2)
    with pytest.raises(TrainingError, match="returned 1 answers to 2 prompts"):
        best_of_n(["a"], lambda prompts: ["x"], lambda *_: 0.0, 2)
    with pytest.raises(TrainingError, match="n is 0"):
        best_of_n(["a"], lambda prompts: [], lambda *_: 0.0, 0)
    with pytest.raises(TrainingError, match="best of 6 answers needs as many for each prompt; one has 5"):
        expected_best(REWARDS, k=6)
    with pytest.raises(TrainingError, match="one has 0"):
        expected_best([])
