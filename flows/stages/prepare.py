"""prepare: tokenised train, validation and test rows with labels, and a report on them with the doctor's findings."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import Dataset, Features, disable_progress_bars

from flows.base.model import check_base, load_tokenizer
from flows.data.encoders import COLUMNS, Encoder, encoder_of, label_names
from flows.data.examples import AnyExample
from flows.data.report import data_report
from flows.data.sources import comes_from, read_examples, refuse_faulty
from flows.data.splits import (
    Row,
    assign_groups,
    hashed_groups,
    replayed,
    sample,
    without_duplicates,
    without_learned,
    without_near_duplicates,
)
from flows.data.tokens import length
from flows.errors import DataError
from flows.params import Data, Params
from flows.paths import SPLITS, Paths, Split
from flows.runtime.progress import progress
from flows.runtime.stage import start
from flows.validation.examination import examine_folder
from peftcore.files import directory_written_atomically

logger = logging.getLogger("flows.prepare")


def run(params: Params, paths: Paths) -> None:
    """Write `paths.data`. Raises DataError or BaseModelError; the folder that was there before then stays."""
    data, seed = params.data, params.project.seed
    check_base(paths.base)
    disable_progress_bars()
    tokenizer = load_tokenizer(paths.base)
    if data.max_length > tokenizer.model_max_length:
        raise DataError(
            f"data.max_length: {data.max_length} is more than the base's context of "
            f"{tokenizer.model_max_length} tokens; give at most that"
        )
    examples = read_examples(data, paths.root)
    labels = label_names(examples)
    rows, dropped = tokenize(examples, encoder_of(data, tokenizer, labels), data)
    if not rows:
        raise DataError(f"no rows are left ({_reasons(dropped)}); give a larger data.max_length, or other data")
    kept, duplicates = _split(rows, data, seed, _learned(params, paths))
    dropped += duplicates
    limits: dict[Split, int | None] = {
        "train": data.train_rows,
        "validation": data.validation_rows,
        "test": data.test_rows,
    }
    splits: dict[Split, list[Row]] = {split: sample(kept[split], limits[split], seed) for split in SPLITS}
    if data.new_files is not None:
        splits["train"] = replayed(kept["train"], data.replay_share, data.train_rows, seed)
    available: dict[Split, int] = {split: len(kept[split]) for split in SPLITS}
    _refuse_empty(splits, dropped)
    report = data_report(data, len(examples), available, splits, dropped, tokenizer, labels)
    assert not any(count for pair in report["leakage"].values() for count in pair.values()), report["leakage"]
    with directory_written_atomically(paths.data) as fresh:
        for split in SPLITS:
            write_rows(splits[split], fresh / paths.split(split).name, COLUMNS[data.kind])
        if labels:
            (fresh / paths.labels.name).write_text(json.dumps(labels, ensure_ascii=False) + "\n")
        findings = examine_folder(fresh, report, tokenizer, data)
        report["doctor"] = findings.as_dict()
        (fresh / paths.data_report.name).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _log(report)
    for finding in findings.of("error", "warning"):
        logger.warning("%s: %s", finding.severity, finding)


def tokenize(examples: list[AnyExample], encoder: Encoder, data: Data) -> tuple[list[Row], Counter[str]]:
    """The examples that fit, and how many were dropped by reason.

    Raises DataError that lists the rows which the template cannot take, or that are too long where that is an error.
    """
    rows, dropped, faults = [], Counter[str](), []
    with progress(len(examples), "tokenise", unit="row") as bar:
        for example in examples:
            bar.update(1)
            try:
                row = _row(example, encoder, data)
            except DataError as error:
                faults.append(f"{example.where}: {error}")
                continue
            if row is None:
                dropped[f"longer than {data.max_length} tokens"] += 1
            else:
                rows.append(row)
    refuse_faulty(faults, f"data.source {data.source}")
    return rows, dropped


def write_rows(rows: list[Row], path: Path, features: Features) -> None:
    """One split as Parquet, the same bytes for the same rows."""
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for row in rows:
        tokens = row.tokens
        origin = {"id": tokens.id, "group": row.group, "slice": row.slice, "weight": row.weight}
        values = tokens.columns() | origin
        for name, column in columns.items():
            column.append(values[name])
    Dataset.from_dict(columns, features=features).to_parquet(path)


def _learned(params: Params, paths: Paths) -> list[tuple[str, str]]:
    """(question, answer) of the rows that the version which training starts from has learned.

    Raises DataError if artifacts/start is not of that version.
    """
    number = params.train.start_from
    found = json.loads(paths.start_source.read_text())["version"] if paths.start_source.exists() else None
    if found != number or (number is not None and not paths.start_learned.exists()):
        raise DataError(
            f"train.start_from is {number or 'null'}, but {paths.start} is of {found or 'none'} or lacks "
            f"{paths.start_learned.name}; run the start stage first (in dvc.yaml, prepare depends on artifacts/start)"
        )
    if number is None:
        return []
    return [(row["question"], row["answer"]) for row in parquet.read_table(paths.start_learned).to_pylist()]


def _split(
    rows: list[Row], data: Data, seed: int, learned: list[tuple[str, str]]
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """The rows of each split without what two splits share, and how many were dropped by reason.

    learned: question and answer of rows that the adapter knows before it is trained; nothing is judged by them.
    """
    shares: dict[Split, float] = {"test": data.test_share, "validation": data.validation_share}
    sizes = Counter(row.group for row in rows)
    hashed = data.assignment == "hashed"
    split_of = hashed_groups(sizes, shares, seed) if hashed else assign_groups(sizes, shares, seed)
    judging = [row for row in rows if row.proven or split_of[row.group] == "train"]
    kept, dropped = without_duplicates(judging, split_of)
    if unproven := len(rows) - len(judging):
        dropped["unproven, so nothing is judged by them"] = unproven
    kept, known = without_learned(kept, {question for question, _ in learned})
    dropped += known
    if data.near_duplicates == "drop":
        kept, near = without_near_duplicates(kept, data.similarity, learned)
        dropped += near
    return kept, dropped


def _row(example: AnyExample, encoder: Encoder, data: Data) -> Row | None:
    """The example as a row; None where it is too long and has to be dropped."""
    tokens, truncated = encoder.encode(example), False
    if (tokens_of_it := length(tokens)) > data.max_length:
        if data.overlong == "error":
            raise DataError(
                f"{tokens_of_it} tokens, more than data.max_length {data.max_length}; raise that, or let "
                "data.overlong drop or truncate"
            )
        shorter = encoder.shorten(example, data.max_length) if data.overlong == "truncate" else None
        if shorter is None:
            return None
        tokens, truncated = encoder.encode(shorter), True
    fresh = data.new_files is None or comes_from(example.where, data.new_files)
    proven = data.quarantined is None or not comes_from(example.where, data.quarantined)
    return Row(tokens, example.group, example.slice, example.weight, truncated, fresh, proven)


def _refuse_empty(splits: dict[Split, list[Row]], dropped: Counter[str]) -> None:
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise DataError(
            f"no rows are left for {' and '.join(empty)} ({_reasons(dropped)}); give more data, a larger "
            "data.max_length, or another share"
        )


def _reasons(dropped: Counter[str]) -> str:
    return "dropped: " + ("; ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none")


def _log(report: dict[str, Any]) -> None:
    for split, of in report["splits"].items():
        logger.info(
            "%s: %d of %d rows in %d groups, %d tokens, %.1f %% supervised",
            *(split, of["rows"], of["available"], of["groups"], of["tokens"], 100 * (of["supervised_share"] or 0)),
        )
    for reason, count in report["dropped"].items():
        logger.info("dropped: %d %s", count, reason)


if __name__ == "__main__":
    start(run)
