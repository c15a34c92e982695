"""Checks of targets of an encoder-decoder: their end, their text, and their lengths."""

import numpy

from flows.data.tokens import IGNORED
from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import SHOWN, Prepared
from flows.validation.template import spread, visible


def ends(prepared: Prepared) -> Finding:
    """Check that every target is learned whole, and ends with the end-of-sequence token."""
    end, wrong, examples = prepared.tokenizer.eos_token_id, 0, ()
    for table in prepared.splits.values():
        targets = table.columns["labels"]
        rows = numpy.array([len(ids) == 0 or ids[-1] != end or IGNORED in ids for ids in targets], bool)
        wrong += int(rows.sum())
        examples += table.named(rows)
    return make_finding(
        "end of targets",
        f"{prepared.tokenizer.eos_token} ends {prepared.rows - wrong} of {prepared.rows} targets",
        wrong,
        error=wrong > 0,
        fix="a model trained on other targets never stops: run `peftcore stage prepare` again",
        examples=examples[:SHOWN],
    )


def texts(prepared: Prepared) -> Finding:
    """Check that the tokens of a target decode to its text."""
    checked, other, examples = 0, 0, ()
    for table in prepared.splits.values():
        rows = spread(len(table.ids))
        ids = [table.columns["labels"][row].tolist() for row in rows]
        for row, decoded in zip(rows, prepared.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            differs = visible(table.answers[row]) != visible(decoded)
            checked, other = checked + 1, other + differs
            examples += (table.ids[row],) if differs and len(examples) < SHOWN else ()
    return make_finding(
        "text of targets",
        f"tokens decode to their text in {checked - other} of {checked} rows",
        other,
        warning=other > 0,
        fix="the model cannot write these targets: give a base whose tokenizer has their characters",
        examples=examples,
    )


def limit(prepared: Prepared) -> Finding:
    """Check that no target exceeds `data.max_length`."""
    counts = numpy.concatenate([[len(ids) for ids in table.columns["labels"]] for table in prepared.splits.values()])
    most = prepared.data.max_length
    return make_finding(
        "lengths of targets",
        f"{counts.min()} to {counts.max()} tokens, median {int(numpy.median(counts))}",
        float(counts.max()),
        error=bool(counts.max() > most),
        fix=f"targets exceed data.max_length {most}: run `peftcore stage prepare` again",
    )
