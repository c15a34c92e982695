"""What is said with a figure that is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from flows.gate.checks import figures
from flows.params import Gate


def candidate(ended: float, answers: dict[str, Any] | None) -> Any:
    return SimpleNamespace(metrics={"adapter": {"ended": ended}, "answers": answers})


@pytest.mark.parametrize(
    ("ended", "longer", "words"),
    [
        (0.85, 0.2, "20% of the reference answers have more tokens than evaluate.max_new_tokens, 40"),
        (0.85, 0.0, None),
        (0.95, 0.2, None),
    ],
)
def test_answers_that_cannot_end_are_told_with_the_limit_that_cuts_them(
    ended: float, longer: float, words: str | None
) -> None:
    answers = {"max_new_tokens": 40, "longer_known_answers": longer}
    passed, told = figures.eos_rate(candidate(ended, answers), Gate(min_eos_rate=0.9))
    assert passed == (ended >= 0.9)
    assert told.startswith(f"{ended:.3f}, at least 0.9")
    assert (words in told and told.endswith("raise it")) if words else told.endswith("0.9")


def test_an_evaluation_that_did_not_count_them_says_nothing_of_them() -> None:
    assert figures.eos_rate(candidate(0.5, None), Gate(min_eos_rate=0.9)) == (False, "0.500, at least 0.9")
