"""Near-duplicates share most of their runs of words; what all texts share is their frame."""

import random

import pytest

from flows.data.near_duplicates import NearDuplicates


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
