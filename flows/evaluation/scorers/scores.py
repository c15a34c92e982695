"""Scores of the generated answers (or predicted classes) of an evaluation, as further columns of its table.

A row's score can fail: the function raises, or returns something that is no finite number. `on_error` of the scorer
decides what follows. The record has the policy and the number of failures of either side.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from flows.data.rows import Row
from flows.errors import StageError
from flows.evaluation.result import EvaluationResult
from flows.evaluation.scorers.texts import Score
from flows.params import Scorer
from flows.runtime.progress import progress

SIDES = ("base", "adapter")
SHOWN = 200
"""Maximum number of characters of a failure's message in the record."""
TOKENS = ("input_ids", "labels")
"""Ends of the names of columns that a scorer does not get. It gets the columns of `data.extra_columns` instead."""


class ScoredAnswer(NamedTuple):
    """An answer to score. row: the prepared row, with its token ids."""

    row: Row
    answer: str
    reference: str


class Scores(NamedTuple):
    """Scores of one side: a number per answer, None for a row that is left out; the failures' ids and messages."""

    values: list[float | None]
    failures: list[str]


def with_scores(
    result: EvaluationResult, scorers: Mapping[str, tuple[Scorer, Score]], rows: Sequence[Row], root: Path
) -> EvaluationResult:
    """Return the result with the columns and the figures of each scorer.

    Args:
        result: The evaluation of the rows.
        scorers: {name: entry and function}.
        rows: Prepared rows of the test split, in the order of the result's table.
        root: The repository, for the identities of the scorers.

    Raises:
        StageError: A scorer with `on_error: stop` failed.
    """
    if not scorers:
        return result
    metrics = result.metrics | {part: dict(result.metrics[part]) for part in (*SIDES, "gain", "slices")}
    metrics["slices"] = {name: dict(figures) for name, figures in metrics["slices"].items()}
    metrics["scorers"] = {}
    table = result.table
    reference, columns = columns_of(table)
    told = table.select(["slice", reference, *columns.values()]).to_pylist()
    answered = [index for index, line in enumerate(told) if line[columns["adapter"]] is not None]
    with progress(len(scorers) * len(SIDES) * len(answered), "score", "answer") as bar:
        for name, (scorer, score) in scorers.items():
            failures: dict[str, list[str]] = {}
            for side in SIDES:
                answers = [
                    ScoredAnswer(rows[index], told[index][columns[side]], told[index][reference]) for index in answered
                ]
                scores = score_answers(scorer, score, answers, f"the {side}", bar)
                failures[side] = scores.failures
                values: list[float | None] = [None] * len(rows)
                for index, value in zip(answered, scores.values, strict=True):
                    values[index] = value
                table = table.append_column(f"{side}_{name}", pa.array(values, pa.float64()))
                metrics[side][name] = mean(values)
                for slice_name, figures in metrics["slices"].items():
                    figures[f"{side}_{name}"] = mean(
                        [value for value, line in zip(values, told, strict=True) if line["slice"] == slice_name]
                    )
            base, adapter = metrics["base"][name], metrics["adapter"][name]
            metrics["gain"][name] = None if base is None or adapter is None else adapter - base
            metrics["scorers"][name] = scorer.identity(root) | {
                "answers": len(answered),
                "failures": {side: len(failures[side]) for side in SIDES},
                "first_failure": next((text for side in SIDES for text in failures[side]), None),
            }
    return replace(result, metrics=metrics, table=table)


def columns_of(table: pa.Table) -> tuple[str, dict[str, str]]:
    """Return the column of the references, and {side: column of its answers}; of a classifier the classes."""
    if "adapter_answer" in table.column_names:
        return "reference", {side: f"{side}_answer" for side in SIDES}
    return "label", {side: f"{side}_prediction" for side in SIDES}


def score_answers(scorer: Scorer, score: Score, answers: Sequence[ScoredAnswer], of: str, bar: Any = None) -> Scores:
    """Score answers; a failing row gets what `on_error` says.

    Args:
        scorer: The entry of `evaluate.scorers`.
        score: Its function.
        answers: The answers.
        of: Whose answers they are, for the error.
        bar: Progress bar that counts answers.

    Raises:
        StageError: `on_error` is stop, and the function failed on a row.
    """
    values: list[float | None] = []
    failures: list[str] = []
    for row, answer, reference in answers:
        shown = shown_row(row)
        prompt = row["prompt"] if "prompt" in row else row["text"]
        try:
            values.append(finite_number(score(prompt, answer, reference, shown)))
        except Exception as error:  # of any code; counted, and the policy decides
            failures.append(f"row {row['id']}: {type(error).__name__}: {error}"[:SHOWN])
            values.append(scorer.on_error if isinstance(scorer.on_error, float) else None)
        if bar is not None:
            bar.update(1)
    if failures and scorer.on_error == "stop":
        raise StageError(
            f"the scorer {scorer.name} failed on {len(failures)} of {len(answers)} answers of {of}, first on "
            f"{failures[0]}; mend it, or give it on_error in evaluate.scorers: the number that such a row gets, or skip"
        )
    return Scores(values, failures)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers; None if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def shown_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a prepared row that a scorer gets: those without tokens, and `data.extra_columns`."""
    shown = {name: value for name, value in row.items() if not name.endswith(TOKENS)}
    return shown | json.loads(shown.pop("extra", None) or "{}")


def finite_number(value: Any) -> float:
    """Return a score as a float. Raises ValueError for anything but a finite number or a truth value."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"it returned {value!r:.80}; a score is a finite number")
    return number
