"""Turns: fields that are left out, renamed, or refused; `test_formats.py` reads whole rows."""

from datetime import datetime

import pytest

from flows.data.turns import FaultyRow, check_order, close_to_known, listed, read_turns

USER = {"role": "user", "content": "One?"}


def test_turns_are_numbered_from_the_first() -> None:
    with pytest.raises(FaultyRow, match=r"turn 5 \(user\) has no text"):
        list(read_turns([USER, {"role": "user"}], (), first=4))


def test_ignored_fields_are_not_looked_at() -> None:
    turn = USER | {"images": ["a.png"], "thinking": 3}
    assert list(read_turns([turn], ("images", "thinking"))) == [USER]


def test_misspelled_fields_have_a_hint() -> None:
    assert close_to_known("Reasoning_Content") == "; did you mean reasoning_content?"
    assert close_to_known("zzz") == close_to_known("name") == ""


def test_lists_may_be_json() -> None:
    assert listed('[{"a": 1}]', "they are") == [{"a": 1}]
    with pytest.raises(FaultyRow, match="they are no JSON"):
        listed("[{", "they are")


def test_a_chat_without_turns_has_no_completion() -> None:
    with pytest.raises(FaultyRow, match="no completion"):
        check_order([])


def test_fields_that_are_empty_inside_are_absent() -> None:
    """As Parquet gives them to a row that lacks them."""
    assert list(read_turns([USER | {"info": {"a": None, "b": [{"c": ""}]}, "n": None}], ())) == [USER]
    assert list(read_turns([USER | {"info": {"a": 0}}], ())) == [USER | {"info": {"a": 0}}]


def test_a_field_that_json_cannot_write_is_refused() -> None:
    with pytest.raises(FaultyRow, match=r"turn 1 \(user\) has a datetime, which is not of JSON"):
        list(read_turns([USER | {"at": datetime(2026, 1, 1)}], ()))
