"""Spellings of one text are one text; other texts stay apart."""

import unicodedata

import pytest

from flows.data.canonical import canonical

TEXT = 'She said "it\'s a café" - and left.'
SPELLINGS = {
    "NFD": unicodedata.normalize("NFD", TEXT),
    "curly quotes": TEXT.replace('"it', "\u201cit").replace('é"', "é\u201d").replace("'", "\u2019"),
    "zero width": TEXT.replace("caf", "ca\u200bf").replace("left", "\ufeffle\u200dft"),
    "soft hyphen": TEXT.replace("said", "sa\u00adid"),
    "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEXT),
    "no-break space": TEXT.replace(" ", "\u00a0"),
    "dash": TEXT.replace(" - ", " \u2014 "),
    "accent kept apart": unicodedata.normalize("NFD", TEXT).replace("e\u0301", "e\u200b\u0301"),
    "direction marks": f"\u202a{TEXT}\u202c",
    "line breaks": TEXT.replace(" ", "\n  "),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_text_are_equal(spelling: str) -> None:
    assert SPELLINGS[spelling] != TEXT
    assert canonical(SPELLINGS[spelling]) == canonical(TEXT)


@pytest.mark.parametrize("other", ["She said it's a cafe.", TEXT.lower(), TEXT.replace("left", "1eft"), "\u0442ext"])
def test_other_texts_stay_apart(other: str) -> None:
    assert canonical(other) != canonical(TEXT)


def test_ascii_keeps_all_but_white_space() -> None:
    text = "a `b` 'c' \"d\" -- e"
    assert canonical(text) == text
