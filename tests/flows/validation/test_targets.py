"""Targets of an encoder-decoder: their end, tokens that decode to their text, and their lengths."""

from typing import Any

from flows.data.tokens import IGNORED
from flows.validation.targets import ends, limit, texts


def test_healthy_targets_are_told_in_figures(patient: Any) -> None:
    well = patient("seq2seq")
    assert well.look(ends).figure.endswith("ends 60 of 60 targets")
    assert "in 60 of 60 rows" in well.look(texts).figure
    assert "tokens, median" in well.look(limit).figure
    assert [well.look(check).severity for check in (ends, texts, limit)] == ["ok"] * 3


def test_a_target_without_its_end_or_with_a_hidden_token_is_an_error(patient: Any) -> None:
    ill = patient("seq2seq")
    ill.change("test", "labels", lambda rows: [rows[0][:-1], [IGNORED, *rows[1][1:]], [], *rows[3:]])
    found = ill.look(ends)
    assert found.severity == "error" and "57 of 60" in found.figure and len(found.examples) == 3


def test_tokens_of_another_text_are_a_warning(patient: Any) -> None:
    ill = patient("seq2seq")
    ill.change("test", "labels", lambda rows: [rows[1], *rows[1:]])
    found = ill.look(texts)
    assert found.severity == "warning" and "59 of 60" in found.figure and len(found.examples) == 1


def test_composed_accents_are_the_text_itself(patient: Any) -> None:
    well = patient("seq2seq")
    accent = well.tokenizer("é", add_special_tokens=False)["input_ids"]
    well.change("test", "target", lambda rows: [row + "e\u0301" for row in rows])
    well.change("test", "labels", lambda rows: [[*row[:-1], *accent, row[-1]] for row in rows])
    assert well.look(texts).severity == "ok"


def test_a_target_beyond_the_limit_is_an_error(patient: Any) -> None:
    ill = patient("seq2seq")
    ill.change("test", "labels", lambda rows: [rows[0] * 200, *rows[1:]])
    found = ill.look(limit)
    assert found.severity == "error" and "data.max_length 200" in found.fix and found.value > 200
