"""prepare: tokenised train, validation and test rows with labels, and a report with the validation's findings."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import Dataset, Features, disable_progress_bars

from flows.base.folder import check_base, load_tokenizer
from flows.base.heads import check_base_of_kind
from flows.data.encoders import COLUMNS, EXTRA, MARGIN, Encoder, encoder_of, label_names
from flows.data.examples import AnyExample
from flows.data.mixture import mixed, mixture_report
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
from flows.data.tokens import AnyTokens, length
from flows.data.vocabulary import check_applied
from flows.errors import DataError
from flows.params import Data, Params, reward_identities
from flows.paths import SPLITS, Paths, Split
from flows.runtime.progress import progress
from flows.runtime.stage import start
from flows.validation.examination import examine_folder
from peftcore.files import directory_written_atomically

logger = logging.getLogger("flows.prepare")


def run(params: Params, paths: Paths) -> None:
    """Write `paths.data`.

    Raises:
        DataError, BaseModelError: The data or the base cannot be used. The folder of an earlier run then stays.
    """
    data, seed = params.data, params.project.seed
    check_base(paths.base)
    check_base_of_kind(paths.base, data.kind)
    disable_progress_bars()
    tokenizer = load_tokenizer(paths.base)
    check_applied(tokenizer, data, paths.root)
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
    assigned, duplicates = _split(rows, data, seed, _learned(params, paths))
    dropped += duplicates
    limits: dict[Split, int | None] = {
        "train": data.train_rows,
        "validation": data.validation_rows,
        "test": data.test_rows,
    }
    splits: dict[Split, list[Row]] = {split: sample(assigned[split], limits[split], seed) for split in SPLITS}
    if data.new_files is not None:
        splits["train"] = replayed(assigned["train"], data.replay_share, data.train_rows, seed)
    if data.mixture:
        splits["train"] = mixed(assigned["train"], data, seed)
    available: dict[Split, int] = {split: len(assigned[split]) for split in SPLITS}
    _refuse_empty(splits, dropped)
    report = data_report(data, len(examples), available, splits, dropped, tokenizer, labels)
    if data.mixture:
        report["mixture"] = mixture_report(data, examples, assigned["train"], splits, paths.root)
    assert not any(count for pair in report["leakage"].values() for count in pair.values()), report["leakage"]
    with directory_written_atomically(paths.data) as folder:
        for split in SPLITS:
            features = COLUMNS[data.kind] | (EXTRA if data.extra_columns else {})
            features |= MARGIN if data.margin_column else {}
            write_rows(splits[split], folder / paths.split(split).name, Features(features))
        if labels:
            (folder / paths.labels.name).write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        if params.train.objective == "grpo":
            # so that a changed reward changes the input of the train stage
            identities = reward_identities(params.train.grpo.rewards, paths.root)
            (folder / paths.rewards.name).write_text(json.dumps(identities, indent=2) + "\n", encoding="utf-8")
        findings = examine_folder(folder, report, tokenizer, data)
        report["doctor"] = findings.as_dict()
        (folder / paths.data_report.name).write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    _log(report)
    for finding in findings.of("error", "warning"):
        logger.warning("%s: %s", finding.severity, finding)


def tokenize(examples: list[AnyExample], encoder: Encoder, data: Data) -> tuple[list[Row], Counter[str]]:
    """Tokenise the examples.

    Returns:
        The rows that fit, and the number of dropped examples by reason.

    Raises:
        DataError: Lists the rows that the template refuses, or that are too long if data.overlong is error.
    """
    rows, dropped, faults = [], Counter[str](), []
    with progress(len(examples), "tokenise", unit="row") as bar:
        for example in examples:
            bar.update(1)
            try:
                parts = encoder.parts(example, data.max_length)
                made = [_row(example, encoder, data)] if parts is None else [_of(example, part, data) for part in parts]
            except DataError as error:
                faults.append(f"{example.where}: {error}")
                continue
            rows += [row for row in made if row is not None]
            if None in made:
                dropped[f"longer than {data.max_length} tokens"] += 1
    refuse_faulty(faults, f"data.source {data.source}")
    return rows, dropped


def write_rows(rows: list[Row], path: Path, features: Features) -> None:
    """Write one split as Parquet; the same rows give the same bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for row in rows:
        tokens = row.tokens
        origin = {"id": tokens.id, "group": row.group, "slice": row.slice, "weight": row.weight}
        values = tokens.columns() | origin | {"extra": row.extra}
        for name, column in columns.items():
            column.append(values[name])
    Dataset.from_dict(columns, features=features).to_parquet(path)


def _learned(params: Params, paths: Paths) -> list[tuple[str, str]]:
    """Return (question, answer) of the rows that the version in train.start_from has learned.

    Raises:
        DataError: artifacts/start is not of that version.
    """
    number = params.train.start_from
    version = (
        json.loads(paths.start_source.read_text(encoding="utf-8"))["version"] if paths.start_source.exists() else None
    )
    if version != number or (number is not None and not paths.start_learned.exists()):
        raise DataError(
            f"train.start_from is {number or 'null'}, but {paths.start} is of {version or 'none'} or lacks "
            f"{paths.start_learned.name}; run the start stage first (in dvc.yaml, prepare depends on artifacts/start)"
        )
    if number is None:
        return []
    return [(row["question"], row["answer"]) for row in parquet.read_table(paths.start_learned).to_pylist()]


def _split(
    rows: list[Row], data: Data, seed: int, learned: list[tuple[str, str]]
) -> tuple[dict[Split, list[Row]], Counter[str]]:
    """Return the rows of each split without overlap, and the number of dropped rows by reason.

    learned: question and answer of rows that the start version has learned; they are not used for evaluation.
    """
    shares: dict[Split, float] = {"test": data.test_share, "validation": data.validation_share}
    sizes = Counter(row.group for row in rows)
    hashed = data.assignment == "hashed"
    split_of = hashed_groups(sizes, shares, seed) if hashed else assign_groups(sizes, shares, seed)
    usable = [row for row in rows if row.trusted or split_of[row.group] == "train"]
    splits, dropped = without_duplicates(usable, split_of)
    if quarantined := len(rows) - len(usable):
        dropped["quarantined, so not used for evaluation"] = quarantined
    splits, known = without_learned(splits, {question for question, _ in learned})
    dropped += known
    if data.near_duplicates == "drop":
        splits, near = without_near_duplicates(splits, data.similarity, learned)
        dropped += near
    return splits, dropped


def _row(example: AnyExample, encoder: Encoder, data: Data) -> Row | None:
    """Return the example as a row; None if it is too long and has to be dropped."""
    tokens, truncated = encoder.encode(example), False
    if (row_length := length(tokens)) > data.max_length:
        if data.overlong == "error":
            raise DataError(
                f"{row_length} tokens, more than data.max_length {data.max_length}; raise that, or let "
                "data.overlong drop or truncate"
            )
        shorter = encoder.shorten(example, data.max_length) if data.overlong == "truncate" else None
        if shorter is None:
            return None
        tokens, truncated = encoder.encode(shorter), True
    return _of(example, tokens, data, truncated)


def _of(example: AnyExample, tokens: AnyTokens, data: Data, truncated: bool = False) -> Row:
    """Return the row of an example's tokens."""
    is_new = data.new_files is None or comes_from(example.where, data.new_files)
    trusted = data.quarantined is None or not comes_from(example.where, data.quarantined)
    return Row(
        tokens, example.group, example.slice, example.weight, truncated, is_new, trusted, example.extra, example.source
    )


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
    for split, summary in report["splits"].items():
        logger.info(
            "%s: %d of %d rows in %d groups, %d tokens, %.1f %% supervised",
            *(split, *(summary[name] for name in ("rows", "available", "groups", "tokens"))),
            100 * (summary["supervised_share"] or 0),
        )
    for name, part in report.get("mixture", {}).items():
        logger.info("%s: %d of %d training rows", name, part["train"], part["available"])
    for reason, count in report["dropped"].items():
        logger.info("dropped: %d %s", count, reason)


if __name__ == "__main__":
    start(run)
