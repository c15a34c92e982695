"""Checks of overlap between splits, and of repetition in the training rows."""

import itertools
from collections import Counter

from flows.data.canonical import canonical
from flows.paths import Split
from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import SHOWN, Prepared

REPEATED = 0.05
"""Share of training rows that are near-duplicates of another from which there is a warning."""


def shared_rows(prepared: Prepared) -> Finding:
    """Check that no two splits share a row, a group or a prompt."""
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
    return make_finding(
        "shared between splits",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        total,
        error=total > 0,
        fix="evaluation rows are in the training rows: run `peftcore stage prepare` again",
        examples=examples[:SHOWN],
    )


def near_duplicates_between_splits(prepared: Prepared) -> Finding:
    """Check that few validation and test rows are near-duplicates of a row in an earlier split."""
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
    shares = {split: len(rows_of) / len(prepared.splits[split].ids) for split, rows_of in pairs.items()}
    return make_finding(
        "near-duplicates between splits",
        ", ".join(f"{len(rows_of)} {split} rows ({shares[split]:.1%})" for split, rows_of in pairs.items()),
        max(shares.values()),
        error=max(shares.values()) > prepared.data.max_leakage,
        warning=any(pairs.values()),
        fix="evaluation measures memorisation: set data.near_duplicates to drop, or data.group_column to a column that "
        "such rows share",
        examples=tuple([*pairs["test"], *pairs["validation"]][:SHOWN]),
    )


def near_duplicates_in_train(prepared: Prepared) -> Finding:
    """Check that few training rows are near-duplicates of an earlier training row."""
    rows, repeated = prepared.row_splits, []
    ids = prepared.splits["train"].ids
    for number, (split, row) in enumerate(rows):
        if split != "train":
            continue
        near = prepared.near.nearest(number, lambda other, row=number: other < row and rows[other][0] == "train")
        if near is not None:
            repeated.append(f"{ids[row]} ~ {ids[rows[near.text][1]]} ({near.similarity:.2f})")
    share = len(repeated) / len(ids)
    return make_finding(
        "near-duplicates in train",
        f"{len(repeated)} of {len(ids)} rows ({share:.1%})",
        share,
        warning=share > REPEATED,
        fix="repeated rows count several times: remove them, or give them smaller weights",
        examples=tuple(repeated[:SHOWN]),
    )
