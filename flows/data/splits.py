"""Train, validation and test splits: whole groups, no duplicates, sampled. Every choice is a hash of the seed.

Unlike a shuffle, a hash moves no other row when a row is added to the data.
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
    """A tokenised example with its group and its slice.

    Attributes:
        weight: Factor of the row's loss.
        truncated: True if the prompt was truncated.
    """

    tokens: AnyTokens
    group: str
    slice: str
    weight: float = 1.0
    truncated: bool = False
    new: bool = True
    """True for a row to train on; False for an older row that is used for replay only."""
    trusted: bool = True
    """False if the row's file is quarantined, so that the row may not be used for evaluation."""
    extra: str | None = None
    """{column: value} as JSON, of the columns that scorers get."""
    source: str = ""
    """Name of the row's source in `data.mixture`."""

    @property
    def prompt_key(self) -> str:
        """Prompt in canonical form."""
        return canonical(self.tokens.question)

    @property
    def key(self) -> tuple[str, str]:
        """Prompt and answer in canonical form."""
        return self.prompt_key, canonical(self.tokens.answer)


def assign_groups(sizes: dict[str, int], shares: dict[Split, float], seed: int) -> dict[str, Split]:
    """Assign each group to a split: fill test and validation up to their shares, and train on the rest.

    A group larger than a share goes to train, so a split has many groups rather than a huge one.

    Args:
        sizes: Rows of each group.
        shares: Shares of test and validation.
        seed: Seed of the order in which groups are tried.

    Raises:
        DataError: There are fewer than three groups.
    """
    if len(sizes) < 3:
        raise DataError(
            f"{len(sizes)} group(s) of rows remain, and train, validation and test need one each; give rows with other "
            "prompts or texts, or another data.group_column (null: rows with the same prompt, and the rows of one "
            "text, are a group)"
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
    """Assign each group to a split by its own hash: added groups move no other group, and shares are approximate."""
    assigned: dict[str, Split] = {}
    for group in groups:
        position = int(rank(seed, group)[:15], 16) / 16**15
        in_test = position < shares["test"]
        assigned[group] = "test" if in_test else "validation" if position < sum(shares.values()) else "train"
    return assigned


def without_duplicates(rows: list[Row], split_of: dict[str, Split]) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """Remove duplicates within and between splits.

    A prompt in two splits stays in test rather than validation, and in validation rather than train. Within a split
    only rows with the same prompt and completion are duplicates. Spelling does not count (`flows.data.canonical`).

    Returns:
        The rows of each split, and the number of dropped rows by reason.
    """
    unique: dict[Split, list[Row]] = {split: [] for split in SPLITS}
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
                unique[split].append(row)
        elsewhere |= {prompt for prompt, _ in seen}
    return unique, dropped


def without_learned(
    splits: dict[Split, list[Row]], learned: Collection[str]
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """Remove rows with learned prompts from test and validation, and count them; train keeps such rows."""
    known = set(map(canonical, learned))
    remaining: dict[Split, list[Row]] = {
        split: [row for row in rows if split == "train" or row.prompt_key not in known]
        for split, rows in splits.items()
    }
    count = sum(map(len, splits.values())) - sum(map(len, remaining.values()))
    return remaining, Counter({LEARNED: count} if count else {})


def without_near_duplicates(
    splits: dict[Split, list[Row]], similarity: float, learned: Sequence[tuple[str, str]] = ()
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """Remove rows that are near-duplicates of a row in another split.

    Such a row stays in test rather than validation, and in validation rather than train, so that the test set does not
    change.

    Args:
        splits: Rows of each split.
        similarity: Smallest similarity of near-duplicates (0 to 1).
        learned: Question and answer of further texts, whose near-duplicates leave test and validation.

    Returns:
        The rows of each split, and the number of dropped rows by reason.
    """
    order: tuple[Split, ...] = ("test", "validation", "train")
    rows = [(split, row) for split in order for row in splits[split]]
    texts = [(row.tokens.question, row.tokens.answer) for _, row in rows]
    index = NearDuplicates([f"{question}\n{answer}" for question, answer in [*texts, *learned]], similarity)
    known = range(len(rows), len(rows) + len(learned))
    remaining: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    elsewhere: set[int] = set()
    for split in order:
        numbers = [number for number, (of, _) in enumerate(rows) if of == split]
        if split != "train":
            numbers = [number for number in numbers if index.nearest(number, known) is None]
        stay = [number for number in numbers if index.nearest(number, elsewhere) is None]
        remaining[split] = [rows[number][1] for number in stay]
        elsewhere.update(stay)
    count = len(rows) - sum(map(len, remaining.values()))
    of = "another split or of a learned row" if learned else "another split"
    return remaining, Counter({f"near-duplicate of {of}": count} if count else {})


def sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Return at most `limit` rows (None: all), in an order that the seed decides."""
    return sorted(rows, key=lambda row: rank(seed, row.tokens.id))[:limit]


def replayed(rows: list[Row], share: float, limit: int | None, seed: int) -> list[Row]:
    """Return at most `limit` rows (None: all that fit), of which `share` are replayed, in the seed's order.

    If there are too few older rows, the number of new rows does not change.
    """
    new, older = ([row for row in rows if row.new is kind] for kind in (True, False))
    whole = len(new) / (1 - share)
    total = whole if limit is None else min(limit, whole)
    count = round(total * share)
    return sample(sample(new, round(total) - count, seed) + sample(older, count, seed), None, seed)


def leakage(splits: dict[Split, list[Row]]) -> dict[str, dict[str, int]]:
    """Return the shared groups and prompts of each pair of splits: {"train-test": {"groups": 0, "prompts": 0}, ...}."""
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
    """Return a name's sort key in the seed's order."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()
