"""Whether what is measured on was trained on, and how much of the training rows says the same again."""

import itertools
from collections import Counter

from flows.data.canonical import canonical
from flows.paths import Split
from flows.validation.findings import Finding, judged
from flows.validation.prepared import SHOWN, Prepared

REPEATED = 0.05
"""Share of training rows that repeat another from which they are worth a warning."""


def shared_rows(prepared: Prepared) -> Finding:
    """No two splits share a row, a group or a prompt."""
    counts: Counter[str] = Counter(rows=0, groups=0, prompts=0)
    examples: tuple[str, ...] = ()
    for one, other in itertools.combinations(prepared.splits.values(), 2):
        for name, a, b in (
            ("rows", one.ids, other.ids),
            ("groups", one.groups, other.groups),
            ("prompts", map(canonical, one.questions), map(canonical, other.questions)),
        ):
            shared = sorted({*a} & {*b})
            counts[name] += len(shared)
            examples += tuple(text[-80:] for text in shared[:SHOWN])
    total = sum(counts.values())
    return judged(
        "shared between splits",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        total,
        error=total > 0,
        fix="what is measured on was trained on: run the prepare stage again",
        examples=examples[:SHOWN],
    )


def near_duplicates_between_splits(prepared: Prepared) -> Finding:
    """Few rows of validation and test are near-duplicates of one that is learned or chosen by."""
    pairs: dict[Split, list[str]] = {"validation": [], "test": []}
    before: dict[Split, tuple[Split, ...]] = {"validation": ("train",), "test": ("train", "validation")}
    rows = prepared.row_splits
    for number, (split, row) in enumerate(rows):
        if split == "train":
            continue
        near = prepared.near.nearest(number, lambda other, split=split: rows[other][0] in before[split])
        if near is not None:
            elsewhere, twin = rows[near.text]
            ids = prepared.splits[split].ids[row], prepared.splits[elsewhere].ids[twin]
            pairs[split].append(f"{split} {ids[0]} ~ {elsewhere} {ids[1]} ({near.similarity:.2f})")
    shares = {split: len(found) / len(prepared.splits[split].ids) for split, found in pairs.items()}
    return judged(
        "near-duplicates between splits",
        ", ".join(f"{len(found)} {split} rows ({shares[split]:.1%})" for split, found in pairs.items()),
        max(shares.values()),
        error=max(shares.values()) > prepared.data.max_leakage,
        warning=any(pairs.values()),
        fix="what is measured is partly remembered: set data.near_duplicates to drop, or data.group_column to what "
        "such rows have in common",
        examples=tuple([*pairs["test"], *pairs["validation"]][:SHOWN]),
    )


def near_duplicates_in_train(prepared: Prepared) -> Finding:
    """Few training rows are near-duplicates of an earlier one."""
    rows, found = prepared.row_splits, []
    ids = prepared.splits["train"].ids
    for number, (split, row) in enumerate(rows):
        if split != "train":
            continue
        near = prepared.near.nearest(number, lambda other, row=number: other < row and rows[other][0] == "train")
        if near is not None:
            found.append(f"{ids[row]} ~ {ids[rows[near.text][1]]} ({near.similarity:.2f})")
    share = len(found) / len(ids)
    return judged(
        "near-duplicates in train",
        f"{len(found)} of {len(ids)} rows ({share:.1%})",
        share,
        warning=share > REPEATED,
        fix="they count as often as they stand there: remove them, or give them a smaller weight",
        examples=tuple(found[:SHOWN]),
    )
