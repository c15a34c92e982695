"""The simulated weeks of feedback: the users' taste, and the table."""

from typing import Any

import pytest

from benchmarks import feedback


@pytest.mark.parametrize(
    ("answer", "is_liked"),
    [
        ("A kettle heats water.", True),
        ("A kettle heats water", False),
        ("word " * (feedback.WORDS - 1) + "end.", True),
        ("word " * feedback.WORDS + "end.", False),
        ("It is hot. ", True),
    ],
)
def test_users_like_short_answers_with_a_full_stop(answer: str, is_liked: bool) -> None:
    assert feedback.likes(answer) is is_liked


def test_the_questions_of_the_panel_are_enough() -> None:
    assert len(feedback.THINGS) == len(set(feedback.THINGS)) > 64
    assert sum("poisoned" in week for week in feedback.WEEKS) == 1 and "trusted" in feedback.WEEKS[0]


def test_the_table_has_a_row_a_week_and_names_excluded_files() -> None:
    week: dict[str, Any] = {"week": "2, poisoned", "before": 0.5, "after": 0.5, "candidate": 0.25, "outcome": "kept"}
    week |= {"version": "v0.1.1", "reason": "refused", "wall": 61.0, "excluded": ["feedback/week2.jsonl"]}
    week["feedback"] = {"ratings": 160, "labels": {"true": 30, "false": 70}}
    table = feedback._table({"requests": 64, "panel": 48, "machine": "a machine", "weeks": [week]})
    assert "| 2, poisoned | 160 | 30 + 70 | 50 % | 25 % | kept v0.1.1 | 50 % | 61 | refused |" in table
    assert "week 2, poisoned: feedback/week2.jsonl" in table
