"""Checks of weights, classes, and good and bad answers of preferences."""

from collections import defaultdict

import numpy

from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import SHOWN, Prepared

EFFECTIVE = 0.5
"""Effective share of the rows under their weights, (Σw)² / (n Σw²) (Kish 1965), below which few rows dominate."""
RARE = 0.05
"""Ratio of the rarest to the commonest class below which the rarest is hardly learned."""
ONE_SIDED = 0.9
"""Share of pairs with the longer answer chosen from which length alone separates the answers."""


def weights(prepared: Prepared) -> Finding:
    """Check that weights are finite and not negative, and that few rows do not outweigh the rest."""
    impossible, zero, effective = 0, 0, 1.0
    for table in prepared.splits.values():
        values = table.weights.astype(float)
        bad = ~(numpy.isfinite(values) & (values >= 0))
        impossible, zero = impossible + int(bad.sum()), zero + int((values == 0).sum())
        if not bad.any():
            squares = float((values**2).sum())
            effective = min(effective, values.sum() ** 2 / (len(values) * squares) if squares else 0.0)
    return make_finding(
        "weights",
        f"{impossible} impossible, {zero} zero; {effective:.0%} of rows effective",
        effective,
        error=impossible > 0 or effective == 0,
        warning=zero > 0 or effective < EFFECTIVE,
        fix="a weight is at least 0, and each split needs weights above 0: correct the weight column"
        if impossible or not effective
        else "rows of weight 0 have no effect, and a few heavy rows dominate: remove them, or narrow the range",
    )


def classes(prepared: Prepared) -> Finding:
    """Check that training has every class of validation and test, and that no class is far rarer than another."""
    names = prepared.report["labels"]
    counts = {
        split: numpy.bincount(numpy.clip(table.columns["label"], 0, len(names)), minlength=len(names) + 1)
        for split, table in prepared.splits.items()
    }
    train, others = counts["train"][:-1], counts["validation"] + counts["test"]
    unseen = [name for name, seen, needed in zip(names, train, others, strict=False) if needed and not seen]
    outside = sum(
        int(((t.columns["label"] < 0) | (t.columns["label"] >= len(names))).sum()) for t in prepared.splits.values()
    )
    present = train[train > 0]
    ratio = present.min() / present.max() if len(present) else 0.0
    error = bool(unseen or outside or len(present) < 2)
    return make_finding(
        "classes",
        f"{len(present)} of {len(names)} in train, the rarest {ratio:.2f} of the commonest"
        + (f"; never in train: {', '.join(unseen)}" if unseen else "")
        + (f"; {outside} rows of no class" if outside else ""),
        ratio,
        error=error,
        warning=ratio < RARE,
        fix="give more rows of each class, or more data.train_rows"
        if error
        else "give more rows of the rare class, or larger weights to its rows",
    )


def desirable(prepared: Prepared) -> Finding:
    """Check that every split has desirable and undesirable answers, and that neither kind is rare in training."""
    shares = {split: float(table.columns["desirable"].mean()) for split, table in prepared.splits.items()}
    one_kind = [split for split, share in shares.items() if share in (0.0, 1.0)]
    share = shares["train"]
    rows = len(prepared.splits["train"].ids)
    return make_finding(
        "desirable answers",
        f"{share:.1%} of {rows:,} training rows"
        + (f"; only one kind of answers in {', '.join(one_kind)}" if one_kind else ""),
        share,
        error=bool(one_kind),
        warning=min(share, 1 - share) < RARE,
        fix="every split needs good and bad answers: give rows of the other kind, or larger splits"
        if one_kind
        else "give more rows of the rare kind, or weigh it by train.kto.desirable_weight or undesirable_weight",
    )


def contradictory_answers(prepared: Prepared) -> Finding:
    """Check that no answer of training is marked as desirable in one row and as undesirable in another."""
    table = prepared.splits["train"]
    marks_of: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for question, answer, mark in zip(table.questions, table.answers, table.columns["desirable"], strict=True):
        marks_of[" ".join(question.split()), " ".join(answer.split())].add(bool(mark))
    both = [answer for answer, marks in marks_of.items() if len(marks) > 1]
    return make_finding(
        "contradictions",
        f"{len(both)} of {len(marks_of)} answers are marked in both ways",
        len(both) / len(marks_of),
        warning=bool(both),
        fix="such an answer teaches nothing: keep the label of most raters",
        examples=tuple(answer[:80] for _, answer in both[:SHOWN]),
    )


def answer_lengths(prepared: Prepared) -> Finding:
    """Check that length alone does not separate desirable from undesirable training answers."""
    table = prepared.splits["train"]
    (sequences,), marks = table.sequences, table.columns["desirable"].astype(bool)
    tokens = sequences.per_row(sequences.supervised)
    good, bad = tokens[marks], numpy.sort(tokens[~marks])
    share = 0.5
    if len(good) and len(bad):  # the probability that a desirable answer is longer; equal lengths count half
        shorter, not_longer = (numpy.searchsorted(bad, good, side=side) for side in ("left", "right"))
        share = float((shorter + not_longer).mean() / (2 * len(bad)))
    return make_finding(
        "length of good answers",
        f"longer than a bad one with probability {share:.0%}",
        share,
        warning=not 1 - ONE_SIDED <= share <= ONE_SIDED,
        fix="the model would learn length instead of quality: add rows of the other kind",
    )


def contradictions(prepared: Prepared) -> Finding:
    """Check that no training text has two classes."""
    table = prepared.splits["train"]
    labels_of: dict[str, set[str]] = defaultdict(set)
    for text, label in zip(table.questions, table.answers, strict=True):
        labels_of[" ".join(text.split())].add(label)
    count = sum(len(labels) > 1 for labels in labels_of.values())
    return make_finding(
        "contradictions",
        f"{count} of {len(labels_of)} texts have several classes",
        count / len(labels_of),
        warning=count > 0,
        fix="keep one class for each text",
        examples=tuple(text[:80] for text, labels in labels_of.items() if len(labels) > 1)[:5],
    )


def equal_pairs(prepared: Prepared) -> Finding:
    """Check that chosen and rejected differ."""
    equal, examples = 0, ()
    for table in prepared.splits.values():
        one, other = table.sequences
        rows = numpy.array([one.row(n) == other.row(n) for n in range(len(table.ids))], bool)
        equal += int(rows.sum())
        examples += table.named(rows)
    return make_finding(
        "chosen and rejected",
        f"the same in {equal} of {prepared.rows} rows",
        equal,
        error=equal > 0,
        fix="such a pair has no preference: remove it",
        examples=examples,
    )


def contradictory_pairs(prepared: Prepared) -> Finding:
    """Check that no two training pairs prefer the same two answers to a prompt in opposite ways."""
    table = prepared.splits["train"]
    one, other = (sequences.answers for sequences in table.sequences)
    pairs = [tuple(" ".join(text.split()) for text in texts) for texts in zip(table.questions, one, other, strict=True)]
    preferred = set(pairs)
    both = [pair for pair in pairs if (pair[0], pair[2], pair[1]) in preferred and pair[1] != pair[2]]
    return make_finding(
        "contradictions",
        f"{len(both)} of {len(pairs)} pairs are preferred in both ways",
        len(both) / len(pairs),
        warning=bool(both),
        fix="such pairs teach nothing: keep the preference of most raters",
        examples=tuple(f"{better[:40]} over {worse[:40]}" for _, better, worse in both[:SHOWN]),
    )


def pair_lengths(prepared: Prepared) -> Finding:
    """Check that the chosen answer is not nearly always the longer, or the shorter one."""
    table = prepared.splits["train"]
    one, other = (sequences.lengths for sequences in table.sequences)
    differ = one != other
    share = float((one > other)[differ].mean()) if differ.any() else 0.5
    return make_finding(
        "length of the chosen",
        f"longer than the rejected in {share:.0%} of the pairs of different length",
        share,
        warning=not 1 - ONE_SIDED <= share <= ONE_SIDED,
        fix="the model would learn length instead of quality: add pairs of the other kind",
    )
