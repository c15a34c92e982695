"""Checks of queries and passages: contradictions, repeated queries, leakage between splits, and hard negatives."""

from collections import Counter, defaultdict

import numpy

from flows.data.canonical import canonical
from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import SHOWN, Prepared

REPEATED = 0.2
"""Share of training rows whose query another row has, too, from which there is a warning."""
SHARED = 0.1
"""Share of test passages that training rows have, too, from which there is a warning."""


def passages(prepared: Prepared) -> Finding:
    """Check that no passage is its own query or negative, and that no query has a passage as right and as wrong."""
    equal, contradicted, examples = 0, 0, ()
    right: dict[str, set[str]] = defaultdict(set)
    for table in prepared.splits.values():
        for query, positive in zip(table.questions, table.answers, strict=True):
            right[canonical(query)].add(canonical(positive))
    for table in prepared.splits.values():
        same, both = numpy.zeros(len(table.ids), bool), numpy.zeros(len(table.ids), bool)
        rows = zip(table.questions, table.answers, table.columns["negatives"], strict=True)
        for number, (query, positive, others) in enumerate(rows):
            same[number] = canonical(query) == canonical(positive)
            both[number] = any(canonical(other) in right[canonical(query)] for other in others)
        equal, contradicted = equal + int(same.sum()), contradicted + int(both.sum())
        examples += table.named(same | both)
    return make_finding(
        "passages",
        f"{equal} of {prepared.rows} rows have their query as the passage, {contradicted} a right passage among the "
        "negatives",
        equal + contradicted,
        error=contradicted > 0,
        warning=equal > 0,
        fix="a right answer to a query cannot be its negative: remove it from `negatives`"
        if contradicted
        else "such a row teaches nothing: remove it",
        examples=examples[:SHOWN],
    )


def repeated_queries(prepared: Prepared) -> Finding:
    """Check that few training rows share their query with another one."""
    table = prepared.splits["train"]
    counts = Counter(map(canonical, table.questions))
    rows = sum(count for count in counts.values() if count > 1)
    share = rows / len(table.ids)
    return make_finding(
        "repeated queries",
        f"{rows} of {len(table.ids)} training rows have a query of several rows",
        share,
        warning=share > REPEATED,
        fix="their passages are no negatives of each other with train.embedding.mask_false_negatives: true; check that "
        "the passages are all right answers, and give more different queries",
        examples=tuple(query[:80] for query, count in counts.most_common(SHOWN) if count > 1),
    )


def shared_passages(prepared: Prepared) -> Finding:
    """Check that few passages of the test rows are in training rows, too."""
    known = set(map(canonical, prepared.splits["train"].answers))
    test = list(map(canonical, prepared.splits["test"].answers))
    shared = [text for text in test if text in known]
    share = len(shared) / len(test)
    return make_finding(
        "passages of other splits",
        f"{len(shared)} of {len(test)} test passages ({share:.1%}) are passages of training rows",
        share,
        warning=share > SHARED,
        fix="the model has seen the right answers: set data.group_column to a column that rows of one passage share, "
        "if new passages have to be found",
        examples=tuple(text[:80] for text in shared[:SHOWN]),
    )


def negatives(prepared: Prepared) -> Finding:
    """Check that either all training rows have hard negatives, or none, and report how many."""
    counts = numpy.array([len(others) for others in prepared.splits["train"].columns["negatives"]])
    without = int((counts == 0).sum())
    return make_finding(
        "hard negatives",
        f"{counts.mean():.1f} per training row, none in {without} of {len(counts)}",
        float(counts.mean()),
        warning=0 < without < len(counts),
        fix="rows without negatives learn from other rows' passages alone: give each row some, or none",
    )
