"""Train, validation and test: whole groups each, without duplicates, and sampled. Every choice is a hash of the seed.

A hash, not a shuffle, so that a row which is added to the data moves no other row.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from flows.data.canonical import canonical
from flows.data.near_duplicates import NearDuplicates
from flows.data.tokens import AnyTokens
from flows.errors import DataError
from flows.paths import SPLITS, Split

LEARNED = "learned by the version that training starts from"


@dataclass(frozen=True)
class Row:
    """A tokenised example; weight: of its loss; `truncated` says whether its prompt was cut."""

    tokens: AnyTokens
    group: str
    slice: str
    weight: float = 1.0
    truncated: bool = False
    fresh: bool = True
    """Whether training is about it, or it may be replayed."""
    proven: bool = True
    """Whether something may be judged by it."""

    @property
    def prompt_key(self) -> str:
        """The prompt, however it is typed."""
        return canonical(self.tokens.question)

    @property
    def key(self) -> tuple[str, str]:
        return self.prompt_key, canonical(self.tokens.answer)


def assign_groups(sizes: dict[str, int], shares: dict[Split, float], seed: int) -> dict[str, Split]:
    """Each group's split. A split is filled up to its share of the rows with groups that fit, the rest trains.

    sizes: rows by group. shares: of test and validation. A group larger than a share thus trains, and a split gets
    many groups rather than one huge one. Raises DataError with fewer than three groups.
    """
    if len(sizes) < 3:
        raise DataError(
            f"the data has {len(sizes)} groups, and train, validation and test need one each; give more data, or "
            "another data.group_column (null: each row is a group)"
        )
    assigned: dict[str, Split] = {}
    for split in ("test", "validation"):
        room = shares[split] * sum(sizes.values())
        free = sorted((group for group in sizes if group not in assigned), key=lambda group: rank(seed, group))
        chosen = []
        for group in free:
            if sizes[group] <= room:
                chosen.append(group)
                room -= sizes[group]
        assigned |= dict.fromkeys(chosen or [min(free, key=lambda group: sizes[group])], split)
    return {group: assigned.get(group, "train") for group in sizes}


def hashed_groups(groups: Iterable[str], shares: dict[Split, float], seed: int) -> dict[str, Split]:
    """Each group's split by its own hash: groups that are added move no other, and shares are met roughly."""
    assigned: dict[str, Split] = {}
    for group in groups:
        place = int(rank(seed, group)[:15], 16) / 16**15
        in_test = place < shares["test"]
        assigned[group] = "test" if in_test else "validation" if place < sum(shares.values()) else "train"
    return assigned


def without_duplicates(rows: list[Row], split_of: dict[str, Split]) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """The rows of each split, and how many were dropped by reason.

    A prompt that stands in two splits stays in test rather than validation, and there rather than in train. Within a
    split only a row with the same prompt and the same completion is a duplicate. Spelling does not count: white space,
    composed or decomposed accents, typographic quotation marks, invisible characters (`flows.data.canonical`).
    """
    kept: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    dropped: Counter[str] = Counter()
    elsewhere: set[str] = set()
    for split in ("test", "validation", "train"):
        seen: set[tuple[str, str]] = set()
        for row in (row for row in rows if split_of[row.group] == split):
            if row.prompt_key in elsewhere:
                dropped["duplicate of another split"] += 1
            elif row.key in seen:
                dropped["duplicate within its split"] += 1
            else:
                seen.add(row.key)
                kept[split].append(row)
        elsewhere |= {prompt for prompt, _ in seen}
    return kept, dropped


def without_learned(
    splits: dict[Split, list[Row]], learned: Collection[str]
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """Leave out of test and validation the rows with a learned prompt, and count them; they may be trained on again."""
    known = set(map(canonical, learned))
    kept: dict[Split, list[Row]] = {
        split: [row for row in rows if split == "train" or row.prompt_key not in known]
        for split, rows in splits.items()
    }
    count = sum(map(len, splits.values())) - sum(map(len, kept.values()))
    return kept, Counter({LEARNED: count} if count else {})


def without_near_duplicates(
    splits: dict[Split, list[Row]], similarity: float, learned: Sequence[tuple[str, str]] = ()
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """The rows that are no near-duplicate of one in another split, and how many were dropped.

    learned: question and answer of further texts; test and validation hold no near-duplicate of them either.

    Such a row stays in test rather than validation, and there rather than in train, so that what is measured on stays
    as it is. similarity: from which two are near-duplicates, 0 to 1.
    """
    order: tuple[Split, ...] = ("test", "validation", "train")
    rows = [(split, row) for split in order for row in splits[split]]
    texts = [(row.tokens.question, row.tokens.answer) for _, row in rows]
    index = NearDuplicates([f"{question}\n{answer}" for question, answer in [*texts, *learned]], similarity)
    known = range(len(rows), len(rows) + len(learned))
    kept: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    elsewhere: set[int] = set()
    for split in order:
        numbers = [number for number, (of, _) in enumerate(rows) if of == split]
        if split != "train":
            numbers = [number for number in numbers if index.nearest(number, known) is None]
        stay = [number for number in numbers if index.nearest(number, elsewhere) is None]
        kept[split] = [rows[number][1] for number in stay]
        elsewhere.update(stay)
    count = len(rows) - sum(map(len, kept.values()))
    of = "another split or of a learned row" if learned else "another split"
    return kept, Counter({f"near-duplicate of {of}": count} if count else {})


def sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows (None: all), in an order that the seed decides."""
    return sorted(rows, key=lambda row: rank(seed, row.tokens.id))[:limit]


def replayed(rows: list[Row], share: float, limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows (None: all that fit), `share` of them such as are not fresh, in an order that the seed has.

    Where older rows are too few, the fresh ones stay as many as they would have been.
    """
    fresh, older = ([row for row in rows if row.fresh is kind] for kind in (True, False))
    whole = len(fresh) / (1 - share)
    total = whole if limit is None else min(limit, whole)
    count = round(total * share)
    return sample(sample(fresh, round(total) - count, seed) + sample(older, count, seed), None, seed)


def leakage(splits: dict[Split, list[Row]]) -> dict[str, dict[str, int]]:
    """How many groups and prompts each two splits share: {"train-test": {"groups": 0, "prompts": 0}, ...}."""
    groups = {split: {row.group for row in rows} for split, rows in splits.items()}
    prompts = {split: {row.prompt_key for row in rows} for split, rows in splits.items()}
    return {
        f"{one}-{other}": {
            "groups": len(groups[one] & groups[other]),
            "prompts": len(prompts[one] & prompts[other]),
        }
        for one, other in itertools.combinations(splits, 2)
    }


def rank(seed: int, name: str) -> str:
    """Where a name comes in the seed's order."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()
