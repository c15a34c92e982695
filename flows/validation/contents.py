"""Text that the vocabulary does not know, or that is no text."""

import re

import numpy

from flows.validation.findings import Finding, judged
from flows.validation.prepared import Prepared

UNKNOWN = 0.01
"""Share of unknown tokens from which the tokenizer is the wrong one."""
_STRANGE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters but for tab, line feed and carriage return, and what stands for bytes that were no UTF-8."""


def vocabulary(prepared: Prepared) -> Finding:
    """All tokens are of the vocabulary, and few stand for text that it does not know."""
    tokenizer, total, unknown, outside = prepared.tokenizer, 0, 0, 0
    # one that also starts or ends sequences says nothing about the text
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    unk = None if tokenizer.unk_token in named else tokenizer.unk_token_id
    for _, sequences in prepared.sequences:
        total += len(sequences.ids)
        outside += int(((sequences.ids < 0) | (sequences.ids >= len(tokenizer))).sum())
        unknown += 0 if unk is None else int((sequences.ids == unk).sum())
    share = unknown / total
    return judged(
        "vocabulary",
        f"{share:.2%} unknown tokens, {outside} outside the vocabulary of {len(tokenizer):,}",
        outside if outside else share,
        error=outside > 0 or share > UNKNOWN,
        warning=unknown > 0,
        fix="the rows are another tokenizer's: run the prepare stage again"
        if outside
        else "take a base whose tokenizer knows this script, or remove the rows",
    )


def characters(prepared: Prepared) -> Finding:
    """No text holds control characters, or marks of bytes that were no UTF-8."""
    strange, examples = 0, ()
    for table in prepared.splits.values():
        rows = [
            bool(_STRANGE.search(q) or _STRANGE.search(a)) for q, a in zip(table.questions, table.answers, strict=True)
        ]
        strange += sum(rows)
        examples += table.named(numpy.array(rows, bool))
    return judged(
        "characters",
        f"{strange} of {prepared.rows} rows hold control or replacement characters",
        strange / prepared.rows,
        warning=strange > 0,
        fix="they are mostly what a wrong encoding left: read the source as what it is, and write it as UTF-8",
        examples=examples,
    )
