"""Leakage: exact or nearly so, between splits it is an error, within train a warning."""

from typing import Any

import pytest

from flows.validation.duplicates import near_duplicates_between_splits, near_duplicates_in_train, shared_rows

LONG = " ".join(f"word{n}" for n in range(60))


@pytest.mark.parametrize(("column", "figure"), [("id", "1 rows"), ("group", "1 groups"), ("prompt", "1 prompts")])
def test_a_row_group_or_prompt_of_two_splits_is_an_error(patient: Any, column: str, figure: str) -> None:
    ill = patient()
    for split in ("train", "test"):
        ill.change(split, column, lambda rows: ["the same", *rows[1:]])
    found = ill.look(shared_rows)
    assert (found.severity, found.value) == ("error", 1)
    assert figure in found.figure


def test_near_duplicates_of_train_in_test_are_an_error_above_the_share_allowed(patient: Any) -> None:
    ill = patient()
    ill.change("train", "prompt", lambda rows: [f"{LONG} a", *rows[1:]])
    ill.change("test", "prompt", lambda rows: [f"{LONG} b", *rows[1:]])
    for split in ("train", "test"):
        ill.change(split, "completion", lambda rows: ["end", *rows[1:]])
    found = ill.look(near_duplicates_between_splits)
    assert found.severity == "error"
    assert "1 test rows (8.3%)" in found.figure
    assert found.examples[0].startswith("test ")
    ill.data = ill.data.model_copy(update={"max_leakage": 0.1})
    assert ill.look(near_duplicates_between_splits).severity == "warning"
    ill.data = ill.data.model_copy(update={"similarity": 0.99})
    assert ill.look(near_duplicates_between_splits).severity == "ok"


def test_near_duplicates_in_train_are_a_warning(patient: Any) -> None:
    ill = patient()
    ill.change("train", "prompt", lambda rows: [f"{LONG} {i}" if i < 4 else row for i, row in enumerate(rows)])
    found = ill.look(near_duplicates_in_train)
    assert (found.severity, found.figure) == ("warning", "3 of 40 rows (7.5%)")
