"""Canonical form of texts for comparison: spelling variants of one text compare equal.

Unicode has many encodings of one text: composed or decomposed accents (NFC, NFD), full-width letters, ligatures,
typographic quotation marks and dashes, invisible characters. None of these makes a different row. Only comparisons use
this form; training uses the text as written.
"""

import unicodedata

_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4"), "'")
_DOUBLE_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"), '"')
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-")
_VARIATIONS = dict.fromkeys([*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0x034F, 0x115F, 0x1160, 0x3164])
"""Variation selectors and fillers, which are invisible although not of the category Cf."""
_TYPED_ALIKE = _QUOTES | _DOUBLE_QUOTES | _DASHES | _VARIATIONS


def canonical(text: str) -> str:
    """Return the canonical form: NFKC, plain quotation marks and dashes, no invisible characters, single spaces."""
    if not text.isascii():
        # before NFKC, which turns some of these into a space and an accent
        folded = unicodedata.normalize("NFKC", text.translate(_TYPED_ALIKE))
        visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
        text = unicodedata.normalize("NFKC", visible)  # letters that an invisible character separated can combine now
    return " ".join(text.split())
