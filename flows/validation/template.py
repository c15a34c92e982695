"""Checks that tokens and text agree: generation starts from the tokens of training, and no text is lost."""

import unicodedata

import numpy

from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import Prepared, Sequences

MOST_CHECKED = 2000
"""Maximum rows of a split that are decoded and tokenised again, evenly spread."""
OTHER_PROMPTS = 0.01
"""Share of rows with differently tokenised prompts from which training and generation differ."""


def special_tokens(prepared: Prepared) -> Finding:
    """Check that each special token is one token, and that no row begins with two BOS tokens."""
    tokenizer = prepared.tokenizer
    broken = [
        token
        for token in tokenizer.all_special_tokens
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [tokenizer.convert_tokens_to_ids(token)]
    ]
    doubled, examples, bos = 0, (), tokenizer.bos_token_id
    for table, sequences in prepared.sequences:
        first = sequences.starts[:-1]
        second = numpy.minimum(first + 1, sequences.starts[1:] - 1)
        both = (sequences.ids[first] == bos) & (sequences.ids[second] == bos) & (second > first)
        doubled += int(both.sum())
        examples += table.named(both)
    return make_finding(
        "special tokens",
        f"{len(broken)} of {len(tokenizer.all_special_tokens)} are several tokens"
        + (f" ({', '.join(broken)})" if broken else "")
        + f", {doubled} rows begin with two {tokenizer.bos_token or 'starts'}",
        len(broken) + doubled,
        error=bool(broken or doubled),
        fix="add them to the tokenizer as special tokens"
        if broken
        else f"remove {tokenizer.bos_token} from the template, or stop the tokenizer from adding it",
        examples=examples,
    )


def generation_prompt(prepared: Prepared) -> Finding:
    """Check that each prompt, tokenised as for generation, is the start of its row."""
    checked, other, examples = 0, 0, ()
    for table in prepared.splits.values():
        rows = spread(len(table.ids))
        prompts = prepared.tokenizer([table.questions[row] for row in rows], add_special_tokens=False)["input_ids"]
        for sequences in table.sequences:
            for row, prompt in zip(rows, prompts, strict=True):
                length = int(table.columns["prompt_length"][row])
                differs = sequences.row(row)[:length] != prompt
                checked, other = checked + 1, other + differs
                examples += (table.ids[row],) if differs and len(examples) < 5 else ()
    return make_finding(
        "generation prompt",
        f"the row's beginning in {checked - other} of {checked} rows",
        other,
        error=other > OTHER_PROMPTS * checked,
        warning=other > 0,
        fix="generation would start from other tokens than training: end the template's generation prompt with a "
        "special token or a line break, and begin no answer with white space",
        examples=examples,
    )


def round_trip(prepared: Prepared) -> Finding:
    """Check that a row's tokens decode to its prompt, its whole answer and the end of turn."""
    checked, other, examples = 0, 0, ()
    kind = prepared.data.kind
    labelled = kind in ("classification", "token_classification", "seq2seq", "retrieval")
    for table, sequences in prepared.sequences:
        rows = spread(len(table.ids))
        for row, decoded in zip(rows, _decoded(prepared, sequences, rows), strict=True):
            text = "" if kind == "retrieval" else table.questions[row]
            text += "" if kind in ("classification", "token_classification", "seq2seq") else sequences.answers[row]
            differs = visible(text) != visible(decoded)
            checked, other = checked + 1, other + differs
            examples += (table.ids[row],) if differs and len(examples) < 5 else ()
    return make_finding(
        "round trip",
        f"tokens decode to their text in {checked - other} of {checked} rows",
        other,
        # a tokenizer for classification or embeddings may drop case or accents
        error=other > 0 and not labelled,
        warning=other > 0,
        fix="text is lost or an answer is cut: check that the tokenizer is the base's, and run "
        "`peftcore stage prepare` again"
        if not labelled
        else "the tokenizer changes the texts; check that it drops nothing that separates them",
        examples=examples,
    )


def _decoded(prepared: Prepared, sequences: Sequences, rows: list[int]) -> list[str]:
    """Return the text of each row; for chats without the last token, the end of turn."""
    if prepared.data.kind in ("classification", "token_classification", "seq2seq", "text", "retrieval"):
        return prepared.tokenizer.batch_decode([sequences.row(row) for row in rows], skip_special_tokens=True)
    return prepared.tokenizer.batch_decode([sequences.row(row)[:-1] for row in rows])


def visible(text: str) -> str:
    """Return a text for comparison: without white space, in composed form (NFC), which some tokenizers write."""
    return unicodedata.normalize("NFC", "".join(text.split()))


def spread(count: int) -> list[int]:
    """Return at most MOST_CHECKED of `count` row numbers, evenly spread."""
    return numpy.unique(numpy.linspace(0, count - 1, min(count, MOST_CHECKED)).astype(int)).tolist()
