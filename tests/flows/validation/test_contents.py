"""Text that the vocabulary does not know, tokens of another vocabulary, characters that are no text."""

from typing import Any

import pytest

from flows.validation.contents import characters, vocabulary


def test_unknown_tokens_are_a_warning_and_many_an_error(patient: Any) -> None:
    ill = patient()
    unknown = ill.tokenizer.unk_token_id
    ill.change("train", "input_ids", lambda rows: [[unknown, *rows[0][1:]], *rows[1:]])
    assert ill.look(vocabulary).severity == "warning"
    ill.change("train", "input_ids", lambda rows: [[unknown, *row[1:]] for row in rows])
    assert ill.look(vocabulary).severity == "error"


def test_a_start_that_is_also_unknown_says_nothing(patient: Any) -> None:
    ill = patient()
    ill.tokenizer.unk_token = ill.tokenizer.bos_token
    assert ill.look(vocabulary).severity == "ok"


def test_tokens_of_another_vocabulary_are_an_error(patient: Any) -> None:
    ill = patient()
    ill.change("train", "input_ids", lambda rows: [[len(ill.tokenizer), *rows[0][1:]], *rows[1:]])
    found = ill.look(vocabulary)
    assert (found.severity, found.value) == ("error", 1)


@pytest.mark.parametrize("text", ["a\x00b", "caf\ufffd", "\x1b[31mred", "a\x9d"])
def test_control_and_replacement_characters_are_a_warning(patient: Any, text: str) -> None:
    ill = patient()
    ill.change("test", "completion", lambda rows: [text, *rows[1:]])
    found = ill.look(characters)
    assert found.severity == "warning"
    assert found.figure.startswith("1 of 60 rows")


@pytest.mark.parametrize("text", ["a\tb\r\nc", "👍🏽 Größe 量", "zero\u200dwidth"])
def test_any_script_and_line_break_is_text(patient: Any, text: str) -> None:
    ill = patient()
    ill.change("test", "completion", lambda rows: [text, *rows[1:]])
    assert ill.look(characters).severity == "ok"
