"""Checks of tagged words: one label for each word, tags that training has, entity types, and the BIO scheme."""

from collections import Counter
from collections.abc import Iterator

import numpy

from flows.data.tokens import IGNORED
from flows.validation.balance import RARE
from flows.validation.findings import Finding, make_finding
from flows.validation.prepared import SHOWN, Prepared

BROKEN = 0.05
"""Share of rows with an entity that I-TYPE begins from which the rows are probably of another scheme."""
OUTSIDE = "O"


def alignment(prepared: Prepared) -> Finding:
    """Check that each word has one label, the index of its tag."""
    numbers = {name: number for number, name in enumerate(prepared.report["labels"])}
    wrong, examples = 0, ()
    for table, sequences in prepared.sequences:
        assert sequences.labels is not None
        rows = numpy.array(
            [
                _labels(sequences.labels[start:stop]) != [numbers.get(tag) for tag in tags.split()]
                for start, stop, tags in zip(sequences.starts[:-1], sequences.starts[1:], table.answers, strict=True)
            ],
            bool,
        )
        wrong += int(rows.sum())
        examples += table.named(rows)
    return make_finding(
        "labels of words",
        f"{wrong} of {prepared.rows} rows whose labels are not their tags",
        wrong,
        error=wrong > 0,
        fix="run `peftcore stage prepare` again; rows from elsewhere need one label for each tag, -100 at other tokens",
        examples=examples[:SHOWN],
    )


def known_tags(prepared: Prepared) -> Finding:
    """Check that training has every tag of validation and test, and more than one tag."""
    counts = {
        split: Counter(tag for tags in table.answers for tag in tags.split())
        for split, table in prepared.splits.items()
    }
    train = counts["train"]
    unseen = sorted({*counts["validation"], *counts["test"]} - train.keys())
    words = sum(train.values())
    error = bool(unseen) or len(train) < 2
    commonest = ", ".join(f"{tag} {count / words:.0%}" for tag, count in train.most_common(3))
    return make_finding(
        "tags",
        f"{len(train)} in train ({commonest}) of {words:,} words"
        + (f"; never in train: {', '.join(unseen[:SHOWN])}" if unseen else ""),
        len(train),
        error=error,
        fix="give more rows with these tags, or more data.train_rows"
        if unseen
        else "a token classifier needs two tags or more",
    )


def entity_types(prepared: Prepared) -> Finding:
    """Check that training has entities, and that no type of entity is far rarer than another."""
    table, plain = prepared.splits["train"], prepared.data.tag_scheme == "plain"
    counts = Counter(
        tag if plain else tag[2:] for tags in table.answers for tag in tags.split() if plain or tag.startswith("B-")
    )
    del counts[OUTSIDE]
    ratio = min(counts.values()) / max(counts.values()) if counts else 0.0
    rarest = min(counts, key=lambda name: counts[name], default="")
    return make_finding(
        "entity types",
        f"{len(counts)} in train, the rarest {ratio:.2f} of the commonest"
        + (f" ({rarest})" if len(counts) > 1 else ""),
        ratio,
        error=not counts,
        warning=ratio < RARE,
        fix="give more rows with entities of the rare type, or train.token_classification.class_weights: balanced"
        if counts
        else "no training word has a tag of an entity: give rows with entities, or more data.train_rows",
    )


def scheme(prepared: Prepared) -> Finding:
    """Check that I-TYPE always continues an entity of its type. Evaluation counts any other I-TYPE as a begin."""
    if prepared.data.tag_scheme == "plain":
        return make_finding("tag scheme", "plain: each tag stands for one word", 0.0, fix="")
    broken, examples = 0, ()
    for table in prepared.splits.values():
        rows = numpy.array([any(_begins_with_i(tags.split())) for tags in table.answers], bool)
        broken += int(rows.sum())
        examples += table.named(rows)
    share = broken / prepared.rows
    return make_finding(
        "tag scheme",
        f"{broken} of {prepared.rows} rows have an I-TYPE that continues no entity of its type",
        share,
        warning=broken > 0,
        fix="most entities begin with I-TYPE, as in the scheme IOB1: write B-TYPE at the first word of each entity"
        if share > BROKEN
        else "write B-TYPE at the first word of each entity",
        examples=examples[:SHOWN],
    )


def _labels(labels: numpy.ndarray) -> list[int]:
    return labels[labels != IGNORED].tolist()


def _begins_with_i(tags: list[str]) -> Iterator[bool]:
    """Yield for each I-TYPE whether it begins an entity."""
    for before, tag in zip([OUTSIDE, *tags], tags, strict=False):
        if tag.startswith("I-"):
            yield before[2:] != tag[2:] or before == OUTSIDE
