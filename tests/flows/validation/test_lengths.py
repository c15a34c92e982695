"""Too long for the limit is an error; cut, dropped or uneven rows are warnings."""

from typing import Any

from flows.validation.lengths import lengths, too_long


def test_a_row_beyond_the_limit_is_an_error(patient: Any) -> None:
    ill = patient()
    ill.data = ill.data.model_copy(update={"max_length": 40})
    found = ill.look(lengths)
    assert found.severity == "error"
    assert "data.max_length 40" in found.fix


def test_one_row_far_longer_than_the_others_is_a_warning(patient: Any) -> None:
    ill = patient()
    ill.data = ill.data.model_copy(update={"max_length": 5000})
    for column, filler in (("input_ids", 70), ("labels", -100)):
        ill.change("train", column, lambda rows, filler=filler: [[filler] * 3000 + rows[0], *rows[1:]])
    assert ill.look(lengths).severity == "warning"


def test_many_cut_prompts_or_dropped_rows_are_a_warning(patient: Any) -> None:
    ill = patient()
    ill.report["splits"]["train"]["truncated"] = 6
    assert ill.look(too_long).severity == "warning"
    ill.report["splits"]["train"]["truncated"] = 0
    ill.report["dropped"] = {"longer than 200 tokens": 13, "duplicate within its split": 40}
    found = ill.look(too_long)
    assert (found.severity, found.figure) == ("warning", "0.0% of rows truncated, 21.7% of examples dropped")
