"""Splits of whole groups, free of duplicates, that stay when data is added."""

from collections import Counter

import pytest

from flows.data.chat import Tokens
from flows.data.splits import (
    Row,
    assign_groups,
    hashed_groups,
    leakage,
    replayed,
    sample,
    without_duplicates,
    without_learned,
    without_near_duplicates,
)
from flows.errors import DataError
from flows.paths import Split

SHARES: dict[Split, float] = {"test": 0.1, "validation": 0.2}
SIZES = {f"module{number}": 1 + number % 7 for number in range(100)}


def row(prompt: str, completion: str = "answer", group: str = "g") -> Row:
    return Row(Tokens([1, 2], [-100, 2], 1, prompt, completion), group, "slice")


def rows_of(assigned: dict[str, Split], sizes: dict[str, int], split: Split) -> int:
    return sum(sizes[group] for group in assigned if assigned[group] == split)


def test_each_split_has_its_share_of_the_rows() -> None:
    assigned, total = assign_groups(SIZES, SHARES, seed=1), sum(SIZES.values())
    assert assigned.keys() == SIZES.keys()
    assert abs(rows_of(assigned, SIZES, "test") - 0.1 * total) < 7
    assert abs(rows_of(assigned, SIZES, "validation") - 0.2 * total) < 7


def test_a_group_larger_than_the_share_trains() -> None:
    assigned = assign_groups(SIZES | {"huge": 300}, SHARES, seed=1)
    assert assigned["huge"] == "train"


def test_three_groups_make_three_splits_whatever_their_sizes() -> None:
    assert sorted(assign_groups({"a": 50, "b": 60, "c": 70}, SHARES, seed=1).values()) == [
        "test",
        "train",
        "validation",
    ]


def test_fewer_groups_than_splits_are_refused() -> None:
    with pytest.raises(DataError, match=r"^2 group\(s\) of rows remain.*rows with other prompts or texts"):
        assign_groups({"a": 5, "b": 5}, SHARES, seed=1)


def test_the_seed_decides() -> None:
    assert assign_groups(SIZES, SHARES, seed=1) == assign_groups(dict(reversed(SIZES.items())), SHARES, seed=1)
    assert assign_groups(SIZES, SHARES, seed=1) != assign_groups(SIZES, SHARES, seed=2)


def test_a_prompt_of_two_splits_stays_in_test_then_validation() -> None:
    split_of: dict[str, Split] = {"a": "train", "b": "validation", "c": "test"}
    rows = [
        row("p", group="a"),
        row("p", group="b"),
        row("p", "other", group="c"),
        row("q", group="a"),
        row("q ", group="b"),
    ]
    kept, dropped = without_duplicates(rows, split_of)
    assert {split: [(row.group, row.tokens.prompt) for row in of] for split, of in kept.items()} == {
        "train": [],
        "validation": [("b", "q ")],
        "test": [("c", "p")],
    }
    assert dropped == {"duplicate of another split": 3}


def test_within_a_split_only_the_same_answer_is_a_duplicate() -> None:
    rows = [row("p\n x"), row("p x"), row("p x", "other")]
    kept, dropped = without_duplicates(rows, {"g": "train"})
    assert [row.tokens.completion for row in kept["train"]] == ["answer", "other"]
    assert dropped == {"duplicate within its split": 1}


def test_a_near_duplicate_stays_in_test_then_validation() -> None:
    text = " ".join(f"word{n}" for n in range(60))
    splits: dict[Split, list[Row]] = {
        "train": [row(f"{text} a"), row("something else altogether, as it is")],
        "validation": [row(f"{text} c"), row("a question of its own, with words")],
        "test": [row(f"{text} d")],
    }
    kept, dropped = without_near_duplicates(splits, 0.8)
    assert {split: len(rows) for split, rows in kept.items()} == {"train": 1, "validation": 1, "test": 1}
    assert dropped == {"near-duplicate of another split": 2}
    assert without_near_duplicates(splits, 1.0) == (splits, {})


@pytest.mark.parametrize(
    "prompt", ["cafe\u0301 \u201cone\u201d", 'caf\u00e9\u200b "one"', '\uff43af\u00e9 "o\u00adne"']
)
def test_a_prompt_that_is_typed_otherwise_is_the_same_prompt(prompt: str) -> None:
    rows = [row('caf\u00e9 "one"', group="a"), row(prompt, group="b")]
    kept, dropped = without_duplicates(rows, {"a": "test", "b": "train"})
    assert ([len(of) for of in kept.values()], dropped) == ([0, 0, 1], {"duplicate of another split": 1})
    splits: dict[Split, list[Row]] = {"train": rows[1:], "validation": [], "test": rows[:1]}
    assert leakage(splits)["train-test"]["prompts"] == 1


def test_a_learned_prompt_that_is_typed_otherwise_judges_nothing() -> None:
    splits: dict[Split, list[Row]] = {
        "test": [row("What is \u201cNaN\u201d?"), row("else")],
        "validation": [row("cafe\u0301  au lait")],
        "train": [row('What is "NaN"?')],
    }
    kept, dropped = without_learned(splits, ['What is "NaN"?', "caf\u00e9 au\u200b lait", "what \u2019else\u2019"])
    assert kept == {"test": [row("else")], "validation": [], "train": splits["train"]}
    assert sum(dropped.values()) == 2


def test_a_row_with_one_word_changed_stays_in_one_split() -> None:
    rows = [row("How do I pay my bill by card?", "Open the page of the bill."), row("How do I pay my invoice by card?",
            "Open the page of the bill.")]  # fmt: skip
    others = [row(f"Number {n * n} of {n}?", f"{n * n + n}.") for n in range(40)]
    splits: dict[Split, list[Row]] = {"train": [rows[0], *others], "validation": [], "test": rows[1:]}
    kept, dropped = without_near_duplicates(splits, 0.8)
    assert (len(kept["train"]), dropped) == (40, {"near-duplicate of another split": 1})


def test_leakage_is_counted() -> None:
    splits: dict[Split, list[Row]] = {
        "train": [row("a", group="1"), row("b", group="2")],
        "validation": [row("c", group="2")],
        "test": [row("a ", group="3")],
    }
    assert leakage(splits) == {
        "train-validation": {"groups": 1, "prompts": 0},
        "train-test": {"groups": 0, "prompts": 1},
        "validation-test": {"groups": 0, "prompts": 0},
    }


def test_a_sample_stays_when_rows_are_added() -> None:
    rows = [row(str(number)) for number in range(200)]
    few = sample(rows[:100], 20, seed=3)
    assert len(few) == 20
    assert few == sample(list(reversed(rows[:100])), 20, seed=3)
    more = sample(rows, None, seed=3)
    assert [row for row in more if row in few] == few
    assert few != sample(rows[:100], 20, seed=4)


def test_hashed_groups_stay_where_they_are_when_data_grow() -> None:
    shares: dict[Split, float] = {"test": 0.2, "validation": 0.1}
    few = hashed_groups([f"g{number}" for number in range(300)], shares, seed=1)
    more = hashed_groups([f"g{number}" for number in range(3000)], shares, seed=1)
    assert few.items() <= more.items()
    counts = Counter(more.values())
    assert counts["test"] == pytest.approx(600, rel=0.1)
    assert counts["validation"] == pytest.approx(300, rel=0.15)
    assert few != hashed_groups(few, shares, seed=2)


@pytest.mark.parametrize(
    ("share", "limit", "fresh", "older"),
    [(0.5, None, 40, 40), (0.5, 20, 10, 10), (0.2, None, 40, 10), (0.0, None, 40, 0), (0.9, None, 40, 100)],
)
def test_older_rows_are_replayed_as_a_share_of_all(share: float, limit: int | None, fresh: int, older: int) -> None:
    rows = [Row(row(str(n)).tokens, "g", "s", new=n < 40) for n in range(140)]
    kept = replayed(rows, share, limit, seed=5)
    assert (sum(one.new for one in kept), sum(not one.new for one in kept)) == (fresh, older)
    assert kept == sample(kept, None, seed=5), "mixed, not one after the other"
