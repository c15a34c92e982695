"""Prepared rows that are well, of each kind, and ways to make them ill."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import COLUMNS, Kind, encoder_of
from flows.data.examples import (
    AnyExample,
    Document,
    Example,
    Labelled,
    Preference,
    Retrieval,
    Tagged,
    Translation,
    UnpairedPreference,
    question_and_answer,
)
from flows.data.report import data_report
from flows.data.splits import Row
from flows.params import Data
from flows.paths import Split
from flows.stages.prepare import write_rows
from flows.validation.examination import examine_folder
from flows.validation.findings import Finding, Findings
from flows.validation.prepared import read_prepared

ROWS: dict[Split, range] = {"train": range(40), "validation": range(40, 48), "test": range(48, 60)}


@dataclass
class Patient:
    """A folder of splits and what they were made with."""

    folder: Path
    report: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: Data

    def change(self, split: Split, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
        """Write a split with one column changed."""
        path = self.folder / f"{split}.parquet"
        table = parquet.read_table(path)
        changed = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
        parquet.write_table(table.set_column(table.column_names.index(column), column, changed), path)

    def look(self, check: Callable[..., Finding]) -> Finding:
        """What one check finds."""
        return check(read_prepared(self.folder, self.report, self.tokenizer, self.data))

    def examine(self) -> Findings:
        return examine_folder(self.folder, self.report, self.tokenizer, self.data)


@pytest.fixture
def patient(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Patient]:
    """`patient("chat")`: healthy rows of that kind."""

    def make(kind: Kind = "chat") -> Patient:
        data = Data(source="rows.jsonl", kind=kind, system_prompt=None, max_length=200)
        names = {"classification": ["even", "odd"], "token_classification": ["B-even", "B-odd", "I-odd", "O"]}
        labels = names.get(kind, [])
        encoder = encoder_of(data, tokenizer, labels)
        splits = {
            split: [Row(encoder.encode(example(kind, n)), f"group{n}", "all") for n in numbers]
            for split, numbers in ROWS.items()
        }
        available = {split: len(rows) for split, rows in splits.items()}
        report = data_report(data, 60, available, splits, Counter(), tokenizer, labels)
        folder = tmp_path / "artifacts" / "data"
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            write_rows(rows, folder / f"{split}.parquet", COLUMNS[kind])
        return Patient(folder, report, tokenizer, data)

    return make


def example(kind: Kind, n: int) -> AnyExample:
    """The n-th row of a kind; no two share a run of words."""
    question, origin = f"Is {n} or {n * n + 1000} more?", {"group": "g", "slice": "all", "where": "here"}
    if kind == "classification":
        return Labelled(question, ("even", "odd")[n % 2], **origin)
    if kind == "token_classification":
        tags = ["O", "B-even" if n % 2 == 0 else "B-odd", "O" if n % 2 == 0 else "I-odd", "O", "O"]
        return Tagged(question.split(), tags, **origin)
    if kind == "text":
        return Document(f"{question} {n * n + 1000}.", **origin)
    if kind == "preference":
        prompt = [{"role": "user", "content": question}]
        short, long = [[{"role": "assistant", "content": text}] for text in (f"{n}.", f"{n}, I do think.")]
        chosen, rejected = (short, long) if n % 2 else (long, short)
        return Preference(prompt, chosen, rejected, **origin)
    if kind == "unpaired_preference":
        (prompt, answer), good = question_and_answer(question, f"{n * n + 1000}.", None), n % 3 != 1
        return UnpairedPreference([prompt], [answer], good, **origin)
    if kind == "retrieval":
        return Retrieval(question, f"It is {n * n + 1000}.", (f"Not {n}, {n * n}.",), **origin)
    if kind == "seq2seq":
        return Translation(question, f"{n * n + 1000}.", **origin)
    return Example(question_and_answer(question, f"{n * n + 1000}.", None), **origin)
