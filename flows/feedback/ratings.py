"""Rated answers of a server's records: one verdict for each answer, from all its ratings.

Each rating that gives no verdict is counted by its reason.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from flows.data.canonical import canonical
from flows.data.examples import Message
from peftcore.errors import ConfigError

Record = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """Choice of the ratings that count.

    Raises:
        ConfigError: `bad` is not below `good`.
    """

    since: datetime | None = None
    """Time of the first rating; None: the earliest."""
    until: datetime | None = None
    """Time before which a rating was given; None: no limit."""
    good: float = 0.75
    """Smallest rating of a good answer (0 to 1)."""
    bad: float = 0.25
    """Largest rating of a bad answer (0 to 1)."""
    per_user: int | None = 50
    """Most ratings of one user, the newest (count); None: no limit."""
    named_only: bool = False
    """True to leave out ratings without a user."""

    def __post_init__(self) -> None:
        if not self.bad < self.good:
            raise ConfigError(f"--bad must be below --good, got {self.bad:g} and {self.good:g}")


@dataclass(frozen=True)
class Rated:
    """One answer with its verdict."""

    prompt: list[Message]
    answer: str
    finish: str
    good: bool | None
    """The verdict; None if there is none, but a correction."""
    correction: str | None
    """The newest better answer that a user gave; None without one."""
    origin: dict[str, str]
    """request_id, model, model_version, week and rater, for the row."""

    @property
    def prompt_key(self) -> str:
        """Prompt in canonical form."""
        return "\0".join(f"{turn['role']}\0{canonical(turn['content'])}" for turn in self.prompt)


@dataclass
class Verdicts:
    """Rated answers, and counts of ratings by the reason why they gave no verdict."""

    answers: list[Rated] = field(default_factory=list)
    ratings: int = 0
    """All ratings of the period (count)."""
    users: int = 0
    """Users who gave them (count)."""
    anonymous: int = 0
    """Ratings without a user (count)."""
    left_out: Counter[str] = field(default_factory=Counter)


def verdicts(records: Iterable[Record], policy: Policy) -> Verdicts:
    """Return the rated answers of records, in the order of the answers."""
    answers: dict[str, Record] = {}
    ratings: list[Record] = []
    for record in records:
        if record["kind"] == "answer":
            answers[record["id"]] = record
        elif _is_in(datetime.fromisoformat(record["time"]), policy):
            ratings.append(record)
    result = Verdicts(ratings=len(ratings))
    known = []
    for one in ratings:
        answer = answers.get(one["id"])
        if answer is None or one["index"] >= len(answer["choices"]):
            result.left_out["of an unknown answer"] += 1
        elif "messages" not in answer:
            result.left_out["of a text completion, which is no chat"] += 1
        else:
            known.append(one | {"user": one["user"] or answer["user"]})
    result.users = len({one["user"] for one in known} - {None})
    result.anonymous = sum(one["user"] is None for one in known)
    ratings_of = _by_answer(_of_users(known, policy, result.left_out))
    rated = [_rated(answers[identity], index, ratings, policy) for (identity, index), ratings in ratings_of.items()]
    result.answers = _agreed(rated, result.left_out)
    return result


def _is_in(time: datetime, policy: Policy) -> bool:
    return (policy.since is None or time >= policy.since) and (policy.until is None or time < policy.until)


def _of_users(ratings: list[Record], policy: Policy, left_out: Counter[str]) -> list[Record]:
    """Return the ratings that count, in their order: of each user the newest, each answer once."""
    count, seen, chosen = Counter[str | None](), set[tuple[str | None, str, int]](), []
    for one in reversed(ratings):
        user, key = one["user"], (one["user"], one["id"], one["index"])
        if user is None:
            if policy.named_only:
                left_out["without a user"] += 1
                continue
        elif key in seen:
            left_out["replaced by a later rating of the same user"] += 1
            continue
        elif policy.per_user is not None and count[user] >= policy.per_user:
            left_out[f"beyond {policy.per_user} of one user"] += 1
            continue
        seen.add(key)
        count[user] += 1
        chosen.append(one)
    return chosen[::-1]


def _by_answer(ratings: list[Record]) -> dict[tuple[str, int], list[Record]]:
    by_answer: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for one in ratings:
        by_answer[one["id"], one["index"]].append(one)
    return by_answer


@dataclass(frozen=True)
class _Votes:
    """One answer with all its ratings."""

    rated: Rated
    good: int
    bad: int
    neutral: int


def _rated(answer: Record, index: int, ratings: list[Record], policy: Policy) -> _Votes:
    scores = [one["rating"] for one in ratings if one["rating"] is not None]
    good, bad = sum(score >= policy.good for score in scores), sum(score <= policy.bad for score in scores)
    corrections = [one["correction"] for one in ratings if (one["correction"] or "").strip()]
    choice, year_and_week = answer["choices"][index], datetime.fromisoformat(answer["time"]).isocalendar()
    origin = {
        "request_id": answer["id"],
        "model": answer["model"],
        "model_version": answer["version"],
        "week": f"{year_and_week.year}-W{year_and_week.week:02}",
        "rater": next((one["user"] for one in ratings if one["user"]), "anonymous"),
    }
    correction = corrections[-1] if corrections else None
    verdict = good > 0 if good or bad else None
    if not scores and correction is not None:  # whoever only gives a better answer finds this one bad
        verdict = False
    rated = Rated(answer["messages"], choice["text"], choice["finish"], verdict, correction, origin)
    return _Votes(rated, good, bad, len(scores) - good - bad)


def _agreed(every: list[_Votes], left_out: Counter[str]) -> list[Rated]:
    """Return the answers without contradiction; equal answers to equal prompts share their ratings."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for votes in every:
        total = sums[votes.rated.prompt_key, canonical(votes.rated.answer)]
        total[0], total[1] = total[0] + votes.good, total[1] + votes.bad
    agreed = []
    for votes in every:
        good, bad = sums[votes.rated.prompt_key, canonical(votes.rated.answer)]
        rated = votes.rated
        if good and bad:
            left_out["contradictory: the same answer is rated good and bad"] += votes.good + votes.bad
            rated = replace(rated, good=None)
        if votes.neutral:
            left_out["neither good nor bad"] += votes.neutral
        if rated.good is not None or rated.correction is not None:
            agreed.append(rated)
    return agreed
