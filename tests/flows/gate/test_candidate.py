"""The two sides of a comparison: what is measured for it is measured at most once, and only if somebody asks."""

import pyarrow
import pytest

from flows.errors import GateError
from flows.gate.candidate import Champion, Reevaluation

ROWS = pyarrow.table({"id": ["a"], "tokens": [3], "adapter_loss": [1.0]})


def test_a_reevaluation_runs_at_the_first_use_and_once() -> None:
    """It takes as long as an evaluation, and three checks want its rows."""
    measured = []

    def measure(side: str) -> Reevaluation:
        measured.append(side)
        return Reevaluation(ROWS, 2)

    champion = Champion(
        "v0.1.0",
        "e" * 64,
        "b" * 64,
        ROWS,
        reevaluate_champion=lambda: measure("champion"),
        reevaluate_candidate=lambda: measure("candidate"),
    )
    assert measured == []
    assert champion.on_candidate_rows is champion.on_candidate_rows
    assert measured == ["champion"]
    assert champion.candidate_on_own_rows is champion.candidate_on_own_rows
    assert measured == ["champion", "candidate"]


def test_rules_that_forbid_a_reevaluation_leave_nothing() -> None:
    champion = Champion("v0.1.0", "e" * 64, "b" * 64, ROWS)
    assert champion.on_candidate_rows is None and champion.candidate_on_own_rows is None


def test_a_reevaluation_that_failed_is_tried_again_by_the_next_check() -> None:
    answers = iter([GateError("v0.1.0 knows other classes"), Reevaluation(ROWS, 0)])

    def measure() -> Reevaluation:
        answer = next(answers)
        if isinstance(answer, GateError):
            raise answer
        return answer

    champion = Champion("v0.1.0", "e" * 64, "b" * 64, ROWS, reevaluate_champion=measure)
    with pytest.raises(GateError, match="other classes"):
        _ = champion.on_candidate_rows
    assert champion.on_candidate_rows == Reevaluation(ROWS, 0)
