"""Near-duplicates share most of their runs of words; what all texts share is their frame."""

import random

import numpy
import pytest

from flows.data.near_duplicates import NearDuplicates, _variants, _words


def words(seed: int, count: int = 60) -> list[str]:
    return random.Random(seed).choices([f"w{n}" for n in range(2000)], k=count)


def texts(frame: str = "") -> list[str]:
    return [f"{frame}{' '.join(words(seed))}" for seed in range(50)]


def edited(text: str) -> str:
    """One word of sixty changed: five runs of 56."""
    return text.rsplit(" ", 1)[0] + " changed"


def test_an_edited_copy_is_found_with_how_similar_it_is() -> None:
    index = NearDuplicates([*texts(), edited(texts()[7])], 0.8)
    near = index.nearest(50, range(50))
    assert near is not None
    assert near.text == 7
    assert near.similarity == pytest.approx(55 / 57)
    assert index.nearest(50, {3}) is None


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
def test_hashing_finds_what_comparing_each_with_each_finds(similarity: float) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        said = text.split()
        return {tuple(said[i : i + 5]) for i in range(len(said) - 4)}

    copies = [" ".join([*words(seed)[: 60 - seed], *words(99 - seed, seed)]) for seed in range(50)]
    index = NearDuplicates([*texts(), *copies], similarity)
    for number, (text, copy) in enumerate(zip(texts(), copies, strict=True)):
        exact = len(runs(text) & runs(copy)) / len(runs(text) | runs(copy))
        if abs(exact - similarity) > 0.05:
            assert (index.nearest(50 + number, {number}) is not None) == (exact > similarity)


def test_case_and_line_breaks_do_not_count() -> None:
    text = " ".join(words(1))
    assert NearDuplicates([text, text.upper().replace(" ", "\n  ")], 1.0).nearest(0, {1}) == (1, 1.0)


def test_a_frame_that_all_share_does_not_make_them_alike() -> None:
    short = [f"{'please do what is asked and no more ' * 5}{seed} {seed * seed}" for seed in range(50)]
    assert all(NearDuplicates(short, 0.5).nearest(number, range(number)) is None for number in range(50))


@pytest.mark.parametrize("text", ["量子計算機は速いと言われています", "ok", "👍🏽", ""])
def test_scripts_without_spaces_and_texts_without_words(text: str) -> None:
    assert NearDuplicates([text, "another text of several words", text], 0.8).nearest(2, {0, 1}) == (0, 1.0)


def test_one_character_of_an_unspaced_script_is_a_word() -> None:
    text = "".join(chr(0x4E00 + n) for n in range(60))
    near = NearDuplicates([text, text[:-1] + "x"], 0.8).nearest(1, {0})
    assert near is not None
    assert 0.8 < near.similarity < 1


FIRST = "where is my parcel ? it left the warehouse on monday and will be with you by thursday ."


@pytest.mark.parametrize(
    "other",
    [
        FIRST.replace("parcel", "package"),
        FIRST.replace("parcel ", ""),
        FIRST.replace("is my", "is my own"),
        FIRST.replace("thursday", "friday"),
        FIRST.replace("where", "when"),
        "When should I go there tomorrow?",
    ],
)
def test_one_changed_word_is_found_in_short_texts(other: str) -> None:
    first = FIRST if other.startswith("whe") else "When should we go there tomorrow?"
    near = NearDuplicates([*texts(), first, other], 0.8).nearest(51, range(51))
    assert near is not None and near.text == 50


@pytest.mark.parametrize(
    "other",
    [
        FIRST.replace("parcel", "package").replace("monday", "sunday"),
        FIRST.replace("parcel ", "").replace("on monday", "on a monday"),
        "I do not know .",
        "where is my parcel ?",
    ],
)
def test_texts_that_differ_in_more_than_a_word_are_not_alike(other: str) -> None:
    assert NearDuplicates([*texts(), FIRST, other], 0.8).nearest(51, range(51)) is None


@pytest.mark.parametrize("similarity", [0.8, 0.5, 1.0])
def test_rows_that_differ_in_the_one_word_that_matters_are_not_alike(similarity: float) -> None:
    rows = [f"Is {number * number + 7} a prime? {'yes' if number % 2 else 'no'}" for number in range(50)]
    index = NearDuplicates(rows, similarity)
    assert all(index.nearest(number, range(number)) is None for number in range(50))


@pytest.mark.parametrize("count", [1, 4, 5, 20, 60])
def test_leaving_a_word_out_hashes_as_the_text_without_it(count: int) -> None:
    hashed = _words(" ".join(words(3, count)))
    nothing_common = numpy.zeros(max(1, count - 4), bool)
    for at in range(count):
        without = numpy.delete(hashed, at)
        alone = set(_variants(without, numpy.ones(0, bool)))
        assert len(alone) == 1 and alone <= set(_variants(hashed, nothing_common))


def test_spelling_does_not_count() -> None:
    text = "It\u2019s a \u201ccafe\u0301\u201d na\u00adme, \uff21\uff22\uff23 and ze\u200bro."
    assert NearDuplicates([text, 'It\'s a "caf\u00e9" name, ABC and zero.'], 1.0).nearest(0, {1}) == (1, 1.0)
