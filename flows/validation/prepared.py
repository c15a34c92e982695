"""Prepared splits as ragged arrays, so that checks of a million tokens are fast."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as parquet
from transformers import PreTrainedTokenizerBase

from flows.data.near_duplicates import NearDuplicates
from flows.data.tokens import IGNORED
from flows.errors import StageError
from flows.params import Data
from flows.paths import SPLITS, Split

SHOWN = 5
"""Number of rows that a finding gives as examples."""
_PROMPT_LENGTH = ("prompt_length",)


@dataclass(frozen=True)
class _Columns:
    """Columns of one kind of rows: question, answers, prefixes of their token ids and labels, and further ones."""

    question: str
    answers: tuple[str, ...]
    sequences: tuple[str, ...] = ("",)
    others: tuple[str, ...] = _PROMPT_LENGTH
    has_labels: bool = True
    """False if `labels` are tokens of another sequence."""


_COLUMNS = {
    "chat": _Columns("prompt", ("completion",)),
    "text": _Columns("prompt", ("completion",)),
    "preference": _Columns("prompt", ("chosen", "rejected"), ("chosen_", "rejected_")),
    "unpaired_preference": _Columns("prompt", ("completion",), others=(*_PROMPT_LENGTH, "desirable")),
    "classification": _Columns("text", ("label_name",), others=("label",)),
    "token_classification": _Columns("text", ("tags",), others=()),
    "seq2seq": _Columns("prompt", ("target",), others=("labels",), has_labels=False),
    "retrieval": _Columns("query", ("positive",), ("query_", "positive_"), ("negatives",)),
}


@dataclass(frozen=True)
class Sequences:
    """The tokens of many rows in one array, as ragged rows.

    Attributes:
        ids: Token ids of all rows, concatenated (tokens,).
        labels: Labels of all rows, concatenated (tokens,); None for kinds of rows without labels.
        starts: Index of each row's first token, then the number of tokens (rows + 1,).
        answers: The text of each row's answer.
    """

    ids: numpy.ndarray
    labels: numpy.ndarray | None
    starts: numpy.ndarray
    answers: list[str]

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each row (rows,)."""
        return numpy.diff(self.starts)

    @cached_property
    def supervised(self) -> numpy.ndarray:
        """Mask of supervised tokens (tokens,)."""
        return numpy.zeros(len(self.ids), bool) if self.labels is None else self.labels != IGNORED

    def per_row(self, tokens: numpy.ndarray) -> numpy.ndarray:
        """Return the number of selected tokens in each row (rows,), for a mask `tokens` (tokens,)."""
        before = numpy.concatenate([[0], numpy.cumsum(tokens)])
        return before[self.starts[1:]] - before[self.starts[:-1]]

    def row(self, number: int) -> list[int]:
        """Return the token ids of one row."""
        return self.ids[self.starts[number] : self.starts[number + 1]].tolist()


@dataclass(frozen=True)
class Table:
    """The rows of one split, as one list or array per column.

    Attributes:
        questions: Prompt of each row.
        answers: Answer of each row.
        sequences: The sequences of the rows; for preference pairs the chosen and the rejected sequences.
    """

    ids: list[str]
    groups: list[str]
    questions: list[str]
    answers: list[str]
    weights: numpy.ndarray
    sequences: list[Sequences]
    columns: dict[str, Any]
    """Further columns of a kind: prompt_length, desirable, label, negatives."""

    def named(self, rows: numpy.ndarray) -> tuple[str, ...]:
        """Return the ids of the first SHOWN rows that a mask (rows,) selects."""
        return tuple(self.ids[number] for number in numpy.flatnonzero(rows)[:SHOWN])


@dataclass(frozen=True)
class Prepared:
    """Output of the prepare stage: splits and report, with the tokenizer and parameters that made them."""

    splits: dict[Split, Table]
    report: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: Data

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(table.ids) for table in self.splits.values())

    @property
    def sequences(self) -> Iterator[tuple[Table, Sequences]]:
        """Every sequence with its table."""
        for table in self.splits.values():
            for sequences in table.sequences:
                yield table, sequences

    @cached_property
    def row_splits(self) -> list[tuple[Split, int]]:
        """(split, row) of every row, in the order of `near`."""
        return [(split, row) for split, table in self.splits.items() for row in range(len(table.ids))]

    @cached_property
    def near(self) -> NearDuplicates:
        """Near-duplicate index of all rows."""
        texts = [f"{q}\n{a}" for t in self.splits.values() for q, a in zip(t.questions, t.answers, strict=True)]
        return NearDuplicates(texts, self.data.similarity)


def read_prepared(folder: Path, report: dict[str, Any], tokenizer: PreTrainedTokenizerBase, data: Data) -> Prepared:
    """Read the splits of a folder; report, tokenizer and data parameters become part of the result.

    Raises:
        StageError: a split lacks a column of `data.kind`.
    """
    splits: dict[Split, Table] = {}
    for split in SPLITS:
        table = parquet.read_table(folder / f"{split}.parquet")
        try:
            splits[split] = _table(table, data)
        except KeyError as error:
            raise StageError(
                f"{split}.parquet lacks a column that data.kind {data.kind} has ({error.args[0]}); "
                "run `peftcore stage prepare` again"
            ) from error
    return Prepared(splits, report, tokenizer, data)


def _table(table: pa.Table, data: Data) -> Table:
    kind = _COLUMNS[data.kind]
    answers = {column: _texts(table, column) for column in kind.answers}
    texts = [answers[column] for column in kind.answers]
    if data.kind == "retrieval":  # a query is a sequence of its own
        texts.insert(0, _texts(table, kind.question))
    sequences = [
        _sequences(table, prefix, list(each), kind.has_labels)
        for prefix, each in zip(kind.sequences, texts, strict=True)
    ]
    return Table(
        ids=_texts(table, "id"),
        groups=_texts(table, "group"),
        questions=_texts(table, kind.question),
        answers=["\n".join(texts) for texts in zip(*answers.values(), strict=True)],
        weights=table["weight"].to_numpy(),
        sequences=sequences,
        columns={
            name: table[name].to_numpy() if name != "negatives" else table[name].to_pylist() for name in kind.others
        },
    )


def _texts(table: pa.Table, column: str) -> list[str]:
    return table[column].to_pylist()


def _sequences(table: pa.Table, prefix: str, answers: list[str], has_labels: bool) -> Sequences:
    ids = table[f"{prefix}input_ids"].combine_chunks()
    starts = numpy.concatenate([[0], numpy.cumsum(ids.value_lengths().to_numpy())])
    labels = None
    if has_labels and f"{prefix}labels" in table.column_names:
        flat = table[f"{prefix}labels"].combine_chunks()
        labels = flat.flatten().to_numpy()
    return Sequences(ids.flatten().to_numpy(), labels, starts, answers)
