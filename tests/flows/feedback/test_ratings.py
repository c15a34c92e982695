"""One verdict for each answer, and a count for each rating that gives none."""

from datetime import UTC, datetime
from typing import Any

import pytest

from flows.feedback.ratings import Policy, Rated, verdicts
from peftcore.errors import ConfigError

DAY = "2026-11-{:02}T12:00:00+00:00"


def answer(identity: str, text: str = "It.", question: str = "Say it.", **fields: Any) -> dict[str, Any]:
    choices = [{"index": number, "text": one, "finish": "stop"} for number, one in enumerate(text.split("|"))]
    record = {"kind": "answer", "id": identity, "time": DAY.format(23), "model": "m", "version": "v0.1.0", "user": None}
    return record | {"messages": [{"role": "user", "content": question}], "choices": choices} | fields


def rating(identity: str, score: float | None, user: str | None = None, day: int = 24, **fields: Any) -> dict[str, Any]:
    record = {"kind": "rating", "id": identity, "time": DAY.format(day), "index": 0, "rating": score, "user": user}
    return record | {"correction": None, "comment": None} | fields


def goods(answers: list[Rated]) -> list[tuple[str, bool | None]]:
    return [(one.origin["request_id"], one.good) for one in answers]


def test_an_answer_has_its_verdict_and_its_origin() -> None:
    records = [answer("a", user="ada"), answer("b", "No."), rating("a", 1.0), rating("b", 0.0, "bob")]
    result = verdicts(records, Policy())
    assert goods(result.answers) == [("a", True), ("b", False)] and not result.left_out
    assert result.answers[0].origin == {
        "request_id": "a",
        "model": "m",
        "model_version": "v0.1.0",
        "week": "2026-W48",
        "rater": "ada",
    }
    assert (result.ratings, result.users, result.anonymous) == (2, 2, 0)


def test_the_answers_of_one_request_have_verdicts_of_their_own() -> None:
    records = [answer("a", "Yes.|No."), rating("a", 1.0), rating("a", 0.0, index=1)]
    assert [(one.answer, one.good) for one in verdicts(records, Policy()).answers] == [("Yes.", True), ("No.", False)]


def test_ratings_that_give_no_verdict_are_counted_by_reason() -> None:
    records = [
        answer("a"),
        answer("b", "Other."),
        answer("c", "Third."),
        {**answer("t"), "prompt": "def"},
        rating("a", 1.0, "ada"),
        rating("a", 0.0, "bob"),
        rating("b", 0.5, "ada"),
        rating("c", 0.0, "ada"),
        rating("c", 1.0, "ada"),
        rating("t", 1.0),
        rating("lost", 1.0),
        rating("c", 1.0, index=4),
    ]
    del records[3]["messages"]
    result = verdicts(records, Policy())
    assert goods(result.answers) == [("c", True)], "the later rating of one user counts"
    assert result.left_out == {
        "contradictory: the same answer is rated good and bad": 2,
        "neither good nor bad": 1,
        "replaced by a later rating of the same user": 1,
        "of a text completion, which is no chat": 1,
        "of an unknown answer": 2,
    }


def test_equal_answers_of_two_requests_contradict_each_other() -> None:
    records = [answer("a", "It is  so."), answer("b", "It is so."), rating("a", 1.0, "ada"), rating("b", 0.0, "bob")]
    result = verdicts(records, Policy())
    assert not result.answers and sum(result.left_out.values()) == 2
    other = [records[0], answer("b", "It is so.", "Another question."), *records[2:]]
    assert len(verdicts(other, Policy()).answers) == 2


def test_one_user_has_at_most_so_many_ratings_the_newest() -> None:
    records = [answer(str(n), f"Text {n}.") for n in range(6)]
    records += [rating(str(n), 1.0, "ada") for n in range(4)] + [rating("4", 1.0, "bob"), rating("5", 1.0)]
    result = verdicts(records, Policy(per_user=2))
    assert [one.origin["request_id"] for one in result.answers] == ["2", "3", "4", "5"]
    assert result.left_out == {"beyond 2 of one user": 2} and result.anonymous == 1
    result = verdicts(records, Policy(per_user=None, named_only=True))
    assert len(result.answers) == 5 and result.left_out == {"without a user": 1}


def test_the_period_is_that_of_the_ratings() -> None:
    records = [answer(str(day), f"Text {day}.") for day in (24, 25, 26)]
    records += [rating(str(day), 1.0, day=day) for day in (24, 25, 26)]
    policy = Policy(datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 26, tzinfo=UTC))
    result = verdicts(records, policy)
    assert goods(result.answers) == [("25", True)] and result.ratings == 1


def test_a_correction_counts_also_where_the_ratings_do_not() -> None:
    records = [answer("a"), rating("a", None, correction="Better."), answer("b", "B."), rating("b", 1.0, "ada")]
    records += [rating("b", 0.0, "bob", correction="Best.")]
    first, second = verdicts(records, Policy()).answers
    assert (first.good, first.correction, second.good, second.correction) == (False, "Better.", None, "Best.")


def test_limits_that_overlap_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--bad must be below --good, got 0\.8 and 0\.75"):
        Policy(bad=0.8)
