"""Whether rows count as they should: their weights, their classes, and the two sides of preferences."""

from collections import defaultdict

import numpy

from flows.validation.findings import Finding, judged
from flows.validation.prepared import Prepared

EFFECTIVE = 0.5
"""Share of rows that weights leave effective, (Σw)² / (n Σw²) (Kish 1965), below which few rows decide."""
RARE = 0.05
"""How many rows the rarest class has for one of the commonest, below which it is hardly learned."""
ONE_SIDED = 0.9
"""Share of pairs whose chosen answer is the longer one from which length alone tells the two apart."""


def weights(prepared: Prepared) -> Finding:
    """Weights are finite and not negative, and no few rows outweigh the rest."""
    impossible, zero, effective = 0, 0, 1.0
    for table in prepared.splits.values():
        values = table.weights.astype(float)
        bad = ~(numpy.isfinite(values) & (values >= 0))
        impossible, zero = impossible + int(bad.sum()), zero + int((values == 0).sum())
        if not bad.any():
            squares = float((values**2).sum())
            effective = min(effective, values.sum() ** 2 / (len(values) * squares) if squares else 0.0)
    return judged(
        "weights",
        f"{impossible} impossible, {zero} zero; {effective:.0%} of rows effective",
        effective,
        error=impossible > 0 or effective == 0,
        warning=zero > 0 or effective < EFFECTIVE,
        fix="a weight is a number of at least 0, and some of every split are above: mend the weight column"
        if impossible or not effective
        else "rows of weight 0 teach nothing and few heavy ones decide: remove the former, narrow the weights' range",
    )


def classes(prepared: Prepared) -> Finding:
    """Training shows every class that is tested, and none far more rarely than another."""
    names = prepared.report["labels"]
    counts = {
        split: numpy.bincount(numpy.clip(table.columns["label"], 0, len(names)), minlength=len(names) + 1)
        for split, table in prepared.splits.items()
    }
    train, others = counts["train"][:-1], counts["validation"] + counts["test"]
    unseen = [name for name, learned, asked in zip(names, train, others, strict=False) if asked and not learned]
    outside = sum(
        int(((t.columns["label"] < 0) | (t.columns["label"] >= len(names))).sum()) for t in prepared.splits.values()
    )
    present = train[train > 0]
    ratio = present.min() / present.max() if len(present) else 0.0
    error = bool(unseen or outside or len(present) < 2)
    return judged(
        "classes",
        f"{len(present)} of {len(names)} in train, the rarest {ratio:.2f} of the commonest"
        + (f"; never in train: {', '.join(unseen)}" if unseen else "")
        + (f"; {outside} rows of no class" if outside else ""),
        ratio,
        error=error,
        warning=ratio < RARE,
        fix="give more rows of each class, or more data.train_rows"
        if error
        else "give more rows of the rare class, or a larger weight to those there are",
    )


def contradictions(prepared: Prepared) -> Finding:
    """No text of train has two classes."""
    table = prepared.splits["train"]
    found: dict[str, set[str]] = defaultdict(set)
    for text, label in zip(table.questions, table.answers, strict=True):
        found[" ".join(text.split())].add(label)
    count = sum(len(labels) > 1 for labels in found.values())
    return judged(
        "contradictions",
        f"{count} of {len(found)} texts have several classes",
        count / len(found),
        warning=count > 0,
        fix="decide for one class each",
        examples=tuple(text[:80] for text, labels in found.items() if len(labels) > 1)[:5],
    )


def equal_pairs(prepared: Prepared) -> Finding:
    """Chosen and rejected differ."""
    equal, examples = 0, ()
    for table in prepared.splits.values():
        one, other = table.sequences
        rows = numpy.array([one.row(n) == other.row(n) for n in range(len(table.ids))], bool)
        equal += int(rows.sum())
        examples += table.named(rows)
    return judged(
        "chosen and rejected",
        f"the same in {equal} of {prepared.rows} rows",
        equal,
        error=equal > 0,
        fix="such a pair says nothing: remove it",
        examples=examples,
    )


def pair_lengths(prepared: Prepared) -> Finding:
    """The chosen answer is not nearly always the longer one, or the shorter."""
    table = prepared.splits["train"]
    one, other = (sequences.lengths for sequences in table.sequences)
    differ = one != other
    share = float((one > other)[differ].mean()) if differ.any() else 0.5
    return judged(
        "length of the chosen",
        f"longer than the rejected in {share:.0%} of the pairs that differ in it",
        share,
        warning=not 1 - ONE_SIDED <= share <= ONE_SIDED,
        fix="a model learns to write more, or less, rather than better: add pairs of the other kind",
    )
