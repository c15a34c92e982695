"""What is learned: a row without supervised tokens, with foreign labels or without its end is an error."""

from typing import Any

from flows.data.tokens import IGNORED
from flows.validation.masks import end_of_turns, mask, supervised


def test_a_row_that_teaches_nothing_is_an_error_by_count(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[IGNORED] * len(rows[0]), *rows[1:]])
    found = ill.look(supervised)
    assert (found.severity, found.value, len(found.examples)) == ("error", 1, 1)
    assert "1 rows without" in found.figure


def test_hardly_any_supervision_is_a_warning(patient: Any) -> None:
    ill = patient()
    for split in ("train", "validation", "test"):
        for column, filler in (("input_ids", 70), ("labels", IGNORED)):
            ill.change(split, column, lambda rows, filler=filler: [[filler] * 1000 + row for row in rows])
    assert ill.look(supervised).severity == "warning"


def test_labels_that_are_not_their_tokens_are_an_error(patient: Any) -> None:
    ill = patient()
    ill.change("test", "labels", lambda rows: [[*rows[0][:-2], 9, rows[0][-1]], *rows[1:]])
    assert (ill.look(mask).severity, ill.look(mask).value) == ("error", 1)


def test_an_answer_with_a_hole_in_its_mask_is_an_error(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[*row[:-3], IGNORED, *row[-2:]] for row in rows])
    assert ill.look(mask).value == 40


def test_a_preference_that_supervises_its_prompt_is_an_error(patient: Any) -> None:
    ill = patient("preference")
    ill.change("train", "rejected_labels", lambda rows: [[1, *rows[0][1:]], *rows[1:]])
    assert ill.look(mask).value == 1


def test_a_turn_without_its_end_is_an_error(patient: Any) -> None:
    ill = patient()
    for column in ("input_ids", "labels"):
        ill.change("validation", column, lambda rows: [rows[0][:-1], *rows[1:]])
    found = ill.look(end_of_turns)
    assert (found.severity, found.value) == ("error", 1)
    assert "never stops" in found.fix


def test_an_earlier_turn_without_its_end_is_one_too(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[rows[0][0], 1, 87, *rows[0][3:]], *rows[1:]])
    assert ill.look(end_of_turns).value == 1


def test_masked_ends_are_errors_though_the_token_is_there(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[*row[:-1], IGNORED] for row in rows])
    assert ill.look(end_of_turns).value == 40
