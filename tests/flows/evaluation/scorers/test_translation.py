"""chrF and BLEU by sacrebleu, where it is installed, and the error where it is not."""

import sys

import pytest

from flows.errors import StageError
from flows.evaluation.scorers import translation


@pytest.mark.parametrize("make", [translation.chrf, translation.bleu])
def test_an_answer_is_better_the_more_it_shares(make) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra scorers)")
    score = make()
    reference = "the cat sat on the mat today"
    whole, part, none = (score("", answer, reference, {}) for answer in (reference, "the cat sat on a rug", "xyz qqq"))
    assert whole == pytest.approx(100) and whole > part > none and none == pytest.approx(0, abs=5)


def test_bleu_of_two_words_by_hand() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra scorers)")
    # precisions 2/2 and 1/1 of the orders that the answer has; brevity exp(1 - 4/2)
    assert translation.bleu()("", "the cat", "the cat sat down", {}) == pytest.approx(100 * 2.718281828**-1, abs=1e-4)


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(StageError, match=r"need sacrebleu .*pip install 'peftcore\[scorers\]'"):
        translation.chrf()


def test_bleu_of_chinese_counts_characters() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra scorers)")
    answer, reference = "今天天气很好", "今天天气不好"
    assert translation.bleu()("", answer, reference, {}) == pytest.approx(0, abs=1e-6)  # one long word
    assert translation.bleu(tokenize="zh")("", answer, reference, {}) > 30
    with pytest.raises(StageError, match="tokenize 13a, intl, zh, char; got 'ja'"):
        translation.bleu(tokenize="ja")
