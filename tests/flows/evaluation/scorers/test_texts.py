"""Scorers of texts, by hand-computed values."""

import pytest

from flows.evaluation.scorers import texts


def test_exact_match_ignores_white_space_at_the_ends_alone() -> None:
    score = texts.exact_match()
    assert [score("", answer, "Paris", {}) for answer in ("Paris", " Paris\n", "paris", "Paris.")] == [1, 1, 0, 0]
    squad = texts.exact_match(normalize=True)
    assert [squad("", answer, "Eiffel Tower", {}) for answer in ("the eiffel  tower.", "tower")] == [1, 0]


def test_a_pattern_may_match_a_part_or_the_whole() -> None:
    part, whole = texts.regex(pattern=r"\d+"), texts.regex(pattern=r"\d+", whole=True)
    assert [part("", answer, "", {}) for answer in ("is 42.", "none")] == [1, 0]
    assert [whole("", answer, "", {}) for answer in (" 42 ", "is 42")] == [1, 0]


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        texts.regex(pattern="(")


def test_a_match_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "REGEX_SECONDS", 0.05)
    with pytest.raises(TimeoutError):
        texts.regex(pattern=r"(a|aa|a?)+$", whole=True)("", "a" * 60 + "b", "", {})


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "a cat sat down", 2 * 2 / (2 + 3)),  # the and a do not count
        ("x x x", "x", 2 * 1 / (3 + 1)),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(answer: str, reference: str, expected: float) -> None:
    assert texts.token_f1()("", answer, reference, {}) == pytest.approx(expected)


def test_length_is_in_words_or_characters() -> None:
    assert texts.length()("", "two  words\n", "", {}) == 2
    assert texts.length(unit="characters")("", "two w", "", {}) == 5
    with pytest.raises(ValueError, match="give words or characters"):
        texts.length(unit="tokens")  # type: ignore[arg-type]


def test_rouge_l_is_that_of_every_evaluation() -> None:
    # the longest common subsequence of 3 and 2 words has 2: precision 2/2, recall 2/3
    assert texts.rouge_l()("", "a b", "a x b", {}) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_the_first_fenced_block_is_taken() -> None:
    assert texts.unfenced("Here:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert texts.unfenced("x = 1") == "x = 1"
