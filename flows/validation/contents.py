"""Checks of text that the vocabulary does not know, or that is not text."""

import re

import numpy

from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import Prepared

UNKNOWN = 0.01
"""Share of unknown tokens from which the tokenizer does not fit the text."""
_STRANGE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters except tab, line feed and carriage return, and the replacement character for invalid UTF-8."""


def vocabulary(prepared: Prepared) -> Finding:
    """Check that all tokens are in the vocabulary, and that few are the unknown token."""
    tokenizer, total, unknown, outside = prepared.tokenizer, 0, 0, 0
    # an unknown token that also starts or ends sequences says nothing about the text
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    unk = None if tokenizer.unk_token in named else tokenizer.unk_token_id
    for _, sequences in prepared.sequences:
        total += len(sequences.ids)
        outside += int(((sequences.ids < 0) | (sequences.ids >= len(tokenizer))).sum())
        unknown += 0 if unk is None else int((sequences.ids == unk).sum())
    share = unknown / total
    return make_finding(
        "vocabulary",
        f"{share:.2%} unknown tokens, {outside} outside the vocabulary of {len(tokenizer):,}",
        outside if outside else share,
        error=outside > 0 or share > UNKNOWN,
        warning=unknown > 0,
        fix="the rows are from another tokenizer: run `peftcore stage prepare` again"
        if outside
        else "use a base whose tokenizer has this script, or remove the rows",
    )


def characters(prepared: Prepared) -> Finding:
    """Check that no text has control characters or replacement characters."""
    strange, examples = 0, ()
    for table in prepared.splits.values():
        rows = [
            bool(_STRANGE.search(q) or _STRANGE.search(a)) for q, a in zip(table.questions, table.answers, strict=True)
        ]
        strange += sum(rows)
        examples += table.named(numpy.array(rows, bool))
    return make_finding(
        "characters",
        f"{strange} of {prepared.rows} rows hold control or replacement characters",
        strange / prepared.rows,
        warning=strange > 0,
        fix="a wrong encoding is the usual cause: read the source in its own encoding, and write it as UTF-8",
        examples=examples,
    )
