"""Checks of row lengths, truncation and dropped rows."""

import numpy

from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import Prepared

TRUNCATED = 0.05
"""Share of rows with a truncated prompt from which there is a warning."""
DROPPED = 0.2
"""Share of examples dropped as too long from which the rest may not represent the data."""
OUTLYING = 20
"""Ratio of the longest row to the median from which there is a warning; a batch is padded to its longest row."""


def lengths(prepared: Prepared) -> Finding:
    """Check that no row exceeds `data.max_length`, and that none is far longer than the others."""
    counts = numpy.concatenate([sequences.lengths for _, sequences in prepared.sequences])
    low, middle, high = (int(numpy.quantile(counts, q, method="nearest")) for q in (0, 0.5, 1))
    limit = prepared.data.max_length
    return make_finding(
        "lengths",
        f"{low} to {high} tokens, median {middle}",
        high,
        error=high > limit,
        warning=high > OUTLYING * middle,
        fix=f"rows exceed data.max_length {limit}: run `peftcore stage prepare` again"
        if high > limit
        else "one long row makes its batch slow: lower data.max_length",
    )


def too_long(prepared: Prepared) -> Finding:
    """Check that few prompts were truncated and few examples dropped. `round_trip` checks that answers are whole."""
    truncated = sum(split["truncated"] for split in prepared.report["splits"].values())
    dropped = sum(n for reason, n in prepared.report["dropped"].items() if reason.startswith("longer than"))
    cut, lost = truncated / prepared.rows, dropped / prepared.report["examples"]
    return make_finding(
        "too long",
        f"{cut:.1%} of rows truncated, {lost:.1%} of examples dropped",
        max(cut, lost),
        warning=cut > TRUNCATED or lost > DROPPED,
        fix=f"raise data.max_length, which is {prepared.data.max_length} tokens, or shorten the prompts",
    )
