"""Prepared splits as ragged arrays: rows end to end, each with its start, as the prepare stage wrote them."""

from typing import Any

import numpy
import pytest
from pyarrow import parquet

from flows.data.tokens import IGNORED
from flows.errors import StageError
from flows.paths import SPLITS
from flows.validation.prepared import SHOWN, Prepared, Sequences, read_prepared

RAGGED = Sequences(
    ids=numpy.array([4, 5, 6, 7, 8, 9]),
    labels=numpy.array([IGNORED, 5, IGNORED, IGNORED, 8, 9]),
    starts=numpy.array([0, 2, 2, 6]),
    answers=["five", "", "nine"],
)
"""Rows of two, no and four tokens."""


def read(patient: Any) -> Prepared:
    return read_prepared(patient.folder, patient.report, patient.tokenizer, patient.data)


def test_rows_of_uneven_length_have_their_own_tokens_and_counts() -> None:
    assert RAGGED.lengths.tolist() == [2, 0, 4]
    assert [RAGGED.row(number) for number in range(3)] == [[4, 5], [], [6, 7, 8, 9]]
    assert RAGGED.per_row(RAGGED.supervised).tolist() == [1, 0, 2]
    assert RAGGED.per_row(RAGGED.ids > 5).tolist() == [0, 0, 4]


def test_without_labels_no_token_is_supervised() -> None:
    unlabelled = Sequences(RAGGED.ids, None, RAGGED.starts, RAGGED.answers)
    assert unlabelled.per_row(unlabelled.supervised).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "prefixes", "question"),
    [
        ("chat", [""], "prompt"),
        ("text", [""], "prompt"),
        ("preference", ["chosen_", "rejected_"], "prompt"),
        ("unpaired_preference", [""], "prompt"),
        ("classification", [""], "text"),
        ("retrieval", ["query_", "positive_"], "query"),
    ],
)
def test_each_row_is_read_as_it_was_written(patient: Any, kind: str, prefixes: list[str], question: str) -> None:
    well = patient(kind)
    prepared = read(well)
    assert prepared.rows == 60 and list(prepared.splits) == list(SPLITS)
    for split, table in prepared.splits.items():
        written = parquet.read_table(well.folder / f"{split}.parquet").to_pylist()
        assert table.ids == [row["id"] for row in written]
        assert table.questions == [row[question] for row in written]
        assert len(table.sequences) == len(prefixes)
        for prefix, sequences in zip(prefixes, table.sequences, strict=True):
            rows = [sequences.row(number) for number in range(len(written))]
            assert rows == [row[f"{prefix}input_ids"] for row in written]
            if kind in ("classification", "retrieval"):
                assert sequences.labels is None
                continue
            supervised = [sum(label != IGNORED for label in row[f"{prefix}labels"]) for row in written]
            assert sequences.per_row(sequences.supervised).tolist() == supervised and min(supervised) > 0


def test_the_two_answers_of_a_pair_are_told_apart_and_compared_together(patient: Any) -> None:
    table = read(patient("preference")).splits["train"]
    chosen, rejected = table.sequences
    assert chosen.answers[:2] == ["0, I do think.", "1."] and rejected.answers[:2] == ["0.", "1, I do think."]
    assert table.answers[1] == "1.\n1, I do think."


def test_rows_are_numbered_in_the_order_in_which_near_duplicates_are_looked_for(patient: Any) -> None:
    ill = patient()
    for column in ("prompt", "completion"):
        copied = parquet.read_table(ill.folder / "train.parquet")[column].to_pylist()[7]
        ill.change("test", column, lambda rows, copied=copied: [rows[0], copied, *rows[2:]])
    prepared = read(ill)
    assert len(prepared.row_splits) == prepared.rows
    near = prepared.near.nearest(7, lambda other: True)
    assert near is not None and prepared.row_splits[near.text] == ("test", 1)


def test_a_finding_shows_the_first_few_rows_by_their_ids(patient: Any) -> None:
    table = read(patient()).splits["train"]
    odd = numpy.arange(40) % 2 == 1
    assert table.named(odd) == tuple(table.ids[number] for number in range(1, 2 * SHOWN, 2))
    assert table.named(~odd & odd) == ()


def test_rows_of_another_kind_name_the_column_that_is_missing(patient: Any) -> None:
    ill = patient("chat")
    ill.data = ill.data.model_copy(update={"kind": "preference"})
    with pytest.raises(
        StageError,
        match=r"train\.parquet lacks a column that data\.kind preference has \(.*chosen.*\); run `peftcore stage",
    ):
        read(ill)
