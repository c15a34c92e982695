"""Checks of labels: supervised tokens in every row, correct labels, and supervised ends of turns."""

import numpy

from flows.data.chat import end_of_turn
from flows.data.tokens import IGNORED
from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import Prepared, Sequences

LITTLE = 0.01
"""Share of supervised tokens below which nearly all computation is spent on prompts."""


def supervised(prepared: Prepared) -> Finding:
    """Check that every row has supervised tokens."""
    none, examples, tokens, learned = 0, (), 0, 0
    for table, sequences in prepared.sequences:
        empty = sequences.per_row(sequences.supervised) == 0
        none += int(empty.sum())
        examples += table.named(empty)
        tokens += len(sequences.ids)
        learned += int(sequences.supervised.sum())
    share = learned / tokens
    return make_finding(
        "supervised tokens",
        f"{share:.1%} of {tokens:,} tokens, {none} rows without",
        none if none else share,
        error=none > 0,
        warning=share < LITTLE,
        fix="a row without a supervised token has no loss: correct or remove it"
        if none
        else "shorten the prompts, or supervise more turns of each chat",
        examples=examples,
    )


def mask(prepared: Prepared) -> Finding:
    """Check that a label is its own token or -100, and that the last answer is supervised as a whole."""
    wrong, examples = 0, ()
    for table, sequences in prepared.sequences:
        assert sequences.labels is not None
        strange = (sequences.labels != IGNORED) & (sequences.labels != sequences.ids)
        answer = _from(sequences, table.columns["prompt_length"])
        holes = answer & ~sequences.supervised
        if prepared.data.kind in ("preference", "unpaired_preference"):
            holes = sequences.supervised & ~answer
        rows = sequences.per_row(strange | holes) > 0
        wrong += int(rows.sum())
        examples += table.named(rows)
    return make_finding(
        "mask",
        f"{wrong} of {prepared.rows} rows whose labels do not fit their tokens",
        wrong,
        error=wrong > 0,
        fix="run `peftcore stage prepare` again; rows from elsewhere need labels that equal their tokens or -100",
        examples=examples,
    )


def end_of_turns(prepared: Prepared) -> Finding:
    """Check that every supervised run ends with the template's end of turn; otherwise the model never stops."""
    end, without, examples = end_of_turn(prepared.tokenizer), 0, ()
    for table, sequences in prepared.sequences:
        last = sequences.supervised & ~numpy.append(sequences.supervised[1:], False)
        ends = sequences.starts[1:] - 1
        last[ends] = sequences.supervised[ends]
        rows = (sequences.per_row(last & (sequences.ids != end)) > 0) | (sequences.per_row(last) == 0)
        without += int(rows.sum())
        examples += table.named(rows)
    token = prepared.tokenizer.convert_ids_to_tokens(end)
    return make_finding(
        "end of turn",
        f"{token} supervised in {1 - without / _count(prepared):.1%} of rows",
        without,
        error=without > 0,
        fix="a model trained on these rows never stops: end every assistant turn with this token, and supervise it",
        examples=examples,
    )


def _from(sequences: Sequences, first: numpy.ndarray) -> numpy.ndarray:
    """Return a mask (tokens,) of the tokens at or after each row's `first`."""
    positions = numpy.arange(len(sequences.ids)) - numpy.repeat(sequences.starts[:-1], sequences.lengths)
    return positions >= numpy.repeat(first, sequences.lengths)


def _count(prepared: Prepared) -> int:
    return sum(len(sequences.lengths) for _, sequences in prepared.sequences)
