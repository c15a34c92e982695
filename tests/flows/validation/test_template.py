"""Text and tokens: lost text, a cut answer, another prompt than generation's, a doubled start."""

from typing import Any

import pytest

from flows.validation.template import generation_prompt, round_trip, special_tokens


def test_a_cut_answer_is_an_error(patient: Any) -> None:
    ill = patient()
    for column in ("input_ids", "labels"):
        ill.change("test", column, lambda rows: [[*rows[0][:-3], rows[0][-1]], *rows[1:]])
    found = ill.look(round_trip)
    assert (found.severity, found.value) == ("error", 1)


def test_other_text_than_the_tokens_is_an_error(patient: Any) -> None:
    ill = patient("preference")
    ill.change("train", "rejected", lambda rows: ["another", *rows[1:]])
    assert ill.look(round_trip).value == 1


def test_composed_accents_are_the_text_itself(patient: Any) -> None:
    well = patient()
    well.change("train", "completion", lambda rows: [row + "e\u0301" for row in rows])
    assert well.look(round_trip).severity == "error"
    accent = well.tokenizer("é", add_special_tokens=False)["input_ids"]
    for column in ("input_ids", "labels"):
        well.change("train", column, lambda rows: [[*row[:-1], *accent, row[-1]] for row in rows])
    assert well.look(round_trip).severity == "ok"


def test_a_tokenizer_that_changes_texts_to_classify_is_a_warning(patient: Any) -> None:
    ill = patient("classification")
    ill.change("train", "text", lambda rows: [row.upper() for row in rows])
    assert ill.look(round_trip).severity == "warning"


@pytest.mark.parametrize(("rows", "severity"), [(40, "error"), (1, "error")])
def test_another_prompt_than_generation_starts_from_is_an_error(patient: Any, rows: int, severity: str) -> None:
    ill = patient()
    ill.change("train", "prompt_length", lambda lengths: [n - (i < rows) for i, n in enumerate(lengths)])
    found = ill.look(generation_prompt)
    assert (found.severity, found.value) == (severity, rows)


def test_two_starts_of_the_sequence_are_an_error(patient: Any) -> None:
    ill = patient()
    for column, filler in (("input_ids", ill.tokenizer.bos_token_id), ("labels", -100)):
        ill.change("train", column, lambda rows, filler=filler: [[filler, *row] for row in rows])
    found = ill.look(special_tokens)
    assert (found.severity, found.value) == ("error", 40)


def test_a_special_token_of_several_tokens_is_an_error(patient: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ill = patient()
    monkeypatch.setattr(type(ill.tokenizer), "all_special_tokens", ["<|im_end|>", "<eos>"])
    found = ill.look(special_tokens)
    assert found.severity == "error"
    assert "(<eos>)" in found.figure
