"""Weights, classes, and good and bad answers."""

from collections.abc import Callable
from typing import Any

import pytest

from flows.validation.balance import (
    answer_lengths,
    classes,
    contradictions,
    contradictory_answers,
    contradictory_pairs,
    desirable,
    equal_pairs,
    pair_lengths,
    weights,
)


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        (lambda rows: [float("nan"), *rows[1:]], "error"),
        (lambda rows: [-1.0, *rows[1:]], "error"),
        (lambda rows: [0.0] * len(rows), "error"),
        (lambda rows: [0.0, *rows[1:]], "warning"),
        (lambda rows: [1000.0, *rows[1:]], "warning"),
        (lambda rows: [2.0, *rows[1:]], "ok"),
    ],
)
def test_weights(patient: Any, change: Callable[[list[float]], list[float]], severity: str) -> None:
    ill = patient()
    ill.change("train", "weight", change)
    assert ill.look(weights).severity == severity


def test_the_effective_rows_are_kishs(patient: Any) -> None:
    ill = patient()
    ill.change("train", "weight", lambda rows: [1.0] * 20 + [0.0] * 20)
    assert ill.look(weights).value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        (lambda rows: [0] * len(rows), "error"),
        (lambda rows: [2, *rows[1:]], "error"),
        (lambda rows: [1] + [0] * (len(rows) - 1), "warning"),
    ],
)
def test_classes(patient: Any, change: Callable[[list[int]], list[int]], severity: str) -> None:
    ill = patient("classification")
    ill.change("train", "label", change)
    assert ill.look(classes).severity == severity


def test_a_class_that_train_lacks_is_named(patient: Any) -> None:
    ill = patient("classification")
    ill.report["labels"].append("rare")
    ill.change("test", "label", lambda rows: [2, *rows[1:]])
    found = ill.look(classes)
    assert found.severity == "error"
    assert "never in train: rare" in found.figure


def test_one_text_of_two_classes_is_a_warning(patient: Any) -> None:
    ill = patient("classification")
    ill.change("train", "text", lambda rows: ["the same", "the  same", *rows[2:]])
    found = ill.look(contradictions)
    assert (found.severity, found.examples) == ("warning", ("the same",))


def test_equal_chosen_and_rejected_are_an_error(patient: Any) -> None:
    ill = patient("preference")
    ids: list[list[int]] = []
    ill.change("train", "chosen_input_ids", lambda rows: ids.extend(rows) or rows)
    ill.change("train", "rejected_input_ids", lambda rows: [ids[0], *rows[1:]])
    ill.change("train", "rejected_labels", lambda rows: [[-100] * len(ids[0]), *rows[1:]])
    found = ill.look(equal_pairs)
    assert (found.severity, found.value) == ("error", 1)


def test_pairs_that_are_preferred_in_both_ways_are_a_warning(patient: Any) -> None:
    ill = patient("preference")
    assert ill.look(contradictory_pairs).severity == "ok"
    ill.change("train", "prompt", lambda rows: ["Which?"] * len(rows))
    ill.change("train", "chosen", lambda rows: ["left", "right ", *rows[2:]])
    ill.change("train", "rejected", lambda rows: ["right", "left", *rows[2:]])
    found = ill.look(contradictory_pairs)
    assert found.severity == "warning" and found.examples == ("left over right", "right over left")


def test_always_longer_chosen_answers_are_a_warning(patient: Any) -> None:
    ill = patient("preference")
    for column in ("chosen_input_ids", "chosen_labels"):
        ill.change("train", column, lambda rows: [row + [70] * 30 for row in rows])
    found = ill.look(pair_lengths)
    assert (found.severity, found.value) == ("warning", 1.0)


@pytest.mark.parametrize(
    ("split", "change", "severity"),
    [
        ("train", lambda rows: [True] * len(rows), "error"),
        ("test", lambda rows: [False] * len(rows), "error"),
        ("train", lambda rows: [False] + [True] * (len(rows) - 1), "warning"),
        ("train", lambda rows: [number % 5 == 0 for number in range(len(rows))], "ok"),
    ],
)
def test_every_split_needs_good_and_bad_answers(
    patient: Any, split: str, change: Callable[[list[bool]], list[bool]], severity: str
) -> None:
    ill = patient("unpaired_preference")
    ill.change(split, "desirable", change)
    found = ill.look(desirable)
    assert found.severity == severity
    if split == "test":
        assert "only one kind of answers in test" in found.figure
    else:
        marks = change([True] * 40)
        assert found.value == pytest.approx(sum(marks) / 40)


def test_an_answer_that_is_marked_in_both_ways_is_a_warning(patient: Any) -> None:
    ill = patient("unpaired_preference")
    assert ill.look(contradictory_answers).severity == "ok"
    for column in ("prompt", "completion"):
        ill.change("train", column, lambda rows: [rows[0], rows[0], *rows[2:]])  # the marks of rows 0 and 1 differ
    found = ill.look(contradictory_answers)
    assert found.severity == "warning" and found.figure.startswith("1 of 39 answers")


def test_good_answers_that_are_always_longer_are_a_warning(patient: Any) -> None:
    ill = patient("unpaired_preference")
    for column in ("input_ids", "labels"):
        ill.change(
            "train", column, lambda rows: [row + [70] * 30 * (number % 3 != 1) for number, row in enumerate(rows)]
        )
    found = ill.look(answer_lengths)
    assert (found.severity, found.value) == ("warning", 1.0)
    ill.change("train", "desirable", lambda rows: [not row for row in rows])
    assert ill.look(answer_lengths).value == 0.0
