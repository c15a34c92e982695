"""How long rows are, and how many were too long."""

import numpy

from flows.validation.findings import Finding, judged
from flows.validation.prepared import Prepared

TRUNCATED = 0.05
"""Share of rows with a cut prompt from which that is worth a warning."""
DROPPED = 0.2
"""Share of examples dropped as too long from which what is left is another set of data."""
OUTLYING = 20
"""How many times the median the longest row may have: a batch pads to its longest."""


def lengths(prepared: Prepared) -> Finding:
    """No row is longer than `data.max_length`, and none is far longer than the others."""
    counts = numpy.concatenate([sequences.lengths for _, sequences in prepared.sequences])
    low, middle, high = (int(numpy.quantile(counts, q, method="nearest")) for q in (0, 0.5, 1))
    limit = prepared.data.max_length
    return judged(
        "lengths",
        f"{low} to {high} tokens, median {middle}",
        high,
        error=high > limit,
        warning=high > OUTLYING * middle,
        fix=f"rows exceed data.max_length {limit}: run the prepare stage again"
        if high > limit
        else "one long row makes its batch slow: lower data.max_length",
    )


def too_long(prepared: Prepared) -> Finding:
    """Few prompts were cut, and few examples dropped. Completions are never cut; `round_trip` sees that."""
    truncated = sum(split["truncated"] for split in prepared.report["splits"].values())
    dropped = sum(n for reason, n in prepared.report["dropped"].items() if reason.startswith("longer than"))
    cut, lost = truncated / prepared.rows, dropped / prepared.report["examples"]
    return judged(
        "too long",
        f"{cut:.1%} of rows truncated, {lost:.1%} of examples dropped",
        max(cut, lost),
        warning=cut > TRUNCATED or lost > DROPPED,
        fix=f"raise data.max_length, which is {prepared.data.max_length} tokens, or shorten the prompts",
    )
