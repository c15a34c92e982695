"""Rows of rated answers, in the formats of `flows.data.formats`, without duplicates and without texts of the test rows.

- unpaired_preference (prompt, completion, label): each good and each bad answer, each correction.
- preference (prompt, chosen, rejected): a good and a bad answer to one prompt, a correction and its answer.
- chat (messages): each good answer, each correction.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flows.data import formats
from flows.data.canonical import canonical
from flows.data.formats import FaultyRow
from flows.data.near_duplicates import NearDuplicates
from flows.errors import DataError
from flows.feedback.ratings import Rated

Row = dict[str, Any]
FeedbackKind = Literal["unpaired_preference", "preference", "chat"]
Texts = tuple[str, str]
"""Prompt and answer, as the prepare stage compares them."""


@dataclass
class Rows:
    """Rows of one file, and counts of rows by the reason why they are left out."""

    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def make_rows(answers: Sequence[Rated], kind: FeedbackKind) -> Rows:
    """Return rows of one kind that can be trained on, without duplicates."""
    result, seen = Rows(), set[tuple[str, ...]]()
    for row in _MAKERS[kind](answers, result.left_out):
        try:
            _check(row, kind)
        except FaultyRow as fault:
            result.left_out[f"no row for training: {fault}"] += 1
            continue
        key = _key(row)
        if key in seen:
            result.left_out["duplicates"] += 1
            continue
        seen.add(key)
        result.rows.append(row)
    return result


def without_known(result: Rows, known: Collection[str]) -> Rows:
    """Leave out rows of requests that an earlier file has. known: request ids."""
    rows = [row for row in result.rows if row["request_id"] not in known]
    return _reduced(result, rows, "of a request that an earlier file has")


def without_test_rows(result: Rows, texts_of: Callable[[Row], Texts], test: Sequence[Texts], similarity: float) -> Rows:
    """Leave out rows with a prompt of the test rows, near-duplicates of a test row, and rows that cannot be tokenised.

    Args:
        result: The rows.
        texts_of: Returns a row's prompt and answer as the test rows have them. Raises DataError for a row that cannot
            be tokenised, such as one whose text holds a special token.
        test: Prompt and answer of each test row.
        similarity: Smallest similarity of near-duplicates (0 to 1).
    """
    prompts = {canonical(prompt) for prompt, _ in test}
    rows, texts, left_out = list[Row](), list[Texts](), Counter[str](result.left_out)
    for row in result.rows:
        try:
            texts.append(texts_of(row))
        except (DataError, FaultyRow) as error:
            left_out[f"no row for training: {error}"] += 1
            continue
        rows.append(row)
    result = Rows(rows, left_out)
    others = [number for number, (prompt, _) in enumerate(texts) if canonical(prompt) not in prompts]
    result = _reduced(result, [result.rows[number] for number in others], "with the prompt of a test row")
    new = [texts[number] for number in others]
    index = NearDuplicates([f"{prompt}\n{answer}" for prompt, answer in [*new, *test]], similarity)
    of_test = range(len(new), len(new) + len(test))
    rows = [row for number, row in enumerate(result.rows) if index.nearest(number, of_test) is None]
    return _reduced(result, rows, "near-duplicates of a test row")


def _reduced(result: Rows, rows: list[Row], reason: str) -> Rows:
    count = len(result.rows) - len(rows)
    return Rows(rows, result.left_out + Counter({reason: count} if count else {}))


def _unpaired(answers: Sequence[Rated], left_out: Counter[str]) -> list[Row]:
    rows = []
    for one in answers:
        if one.good is not None and _is_whole(one, one.good, left_out):
            rows.append({"prompt": one.prompt, "completion": one.answer, "label": one.good, **one.origin})
        if one.correction is not None:
            rows.append({"prompt": one.prompt, "completion": one.correction, "label": True, **one.origin})
    return rows


def _pairs(answers: Sequence[Rated], left_out: Counter[str]) -> list[Row]:
    rows = [
        {"prompt": one.prompt, "chosen": one.correction, "rejected": one.answer, **one.origin}
        for one in answers
        if one.correction is not None
    ]
    rated: dict[str, tuple[list[Rated], list[Rated]]] = defaultdict(lambda: ([], []))
    for one in answers:
        if one.good is not None and one.correction is None and _is_whole(one, one.good, left_out):
            rated[one.prompt_key][0 if one.good else 1].append(one)
    for good, bad in rated.values():
        rows += [
            {"prompt": one.prompt, "chosen": one.answer, "rejected": other.answer, **one.origin}
            for one, other in zip(good, bad, strict=False)
        ]
        if single := abs(len(good) - len(bad)):
            left_out["answers without a partner of the other rating for the same prompt"] += single
    return rows


def _chats(answers: Sequence[Rated], left_out: Counter[str]) -> list[Row]:
    rows = []
    for one in answers:
        texts = [one.correction] if one.correction is not None else []
        if one.good and one.correction is None and _is_whole(one, True, left_out):
            texts.append(one.answer)
        elif one.good is False and one.correction is None:
            left_out["bad answers, which a chat cannot teach"] += 1
        rows += [{"messages": [*one.prompt, {"role": "assistant", "content": text}], **one.origin} for text in texts]
    return rows


_MAKERS: dict[FeedbackKind, Callable[[Sequence[Rated], Counter[str]], list[Row]]] = {
    "unpaired_preference": _unpaired,
    "preference": _pairs,
    "chat": _chats,
}


def _is_whole(one: Rated, good: bool, left_out: Counter[str]) -> bool:
    """Return False, and count it, for a good answer that the token limit cut off: it would teach to stop there."""
    if good and one.finish == "length":
        left_out["good answers that the token limit cut off"] += 1
        return False
    return True


def _check(row: Row, kind: FeedbackKind) -> None:
    """Raise FaultyRow if the prepare stage would refuse the row."""
    if kind == "unpaired_preference":
        formats.unpaired_preference(row)
    elif kind == "preference":
        formats.preference(row)
    else:
        formats.chat(row)


def _key(row: Row) -> tuple[str, ...]:
    """Return the row's texts in canonical form, without its origin."""
    turns = row.get("messages") or row["prompt"]
    prompt = [part for turn in turns for part in (turn["role"], canonical(turn["content"]))]
    texts = (canonical(row[column]) for column in ("completion", "chosen", "rejected") if column in row)
    return (*prompt, *texts, str(row.get("label")))
