"""Built-in scorers of translations: chrF and BLEU by sacrebleu, of each answer by itself (0 to 100).

The mean over answers is not the BLEU of the whole set of answers, which the paired bootstrap could not use.
"""

from collections.abc import Callable
from typing import Any

from flows.errors import StageError
from flows.evaluation.scorers.texts import Score

TOKENIZERS = ("13a", "intl", "zh", "char")
"""sacrebleu's divisions of texts into words that need no further package."""


def chrf(*, word_order: int = 0) -> Score:
    """Return a scorer: chrF of the answer; 2 as `word_order` gives chrF++.

    Args:
        word_order: Maximum number of words in a row that are compared, besides characters.
    """
    metric = _metrics().CHRF(word_order=word_order)
    return _of_sentences(metric.sentence_score)


def bleu(*, tokenize: str = "13a") -> Score:
    """Return a scorer: BLEU of the answer. An order without any n-gram in a short answer does not count.

    Args:
        tokenize: How sacrebleu divides texts into words: "13a" (European languages), "intl" (all scripts with spaces
            between words), "zh" (Chinese) or "char" (single characters).

    Raises:
        StageError: There is no such division, or sacrebleu is not installed.
    """
    if tokenize not in TOKENIZERS:
        raise StageError(f"the scorer bleu has tokenize {', '.join(TOKENIZERS)}; got {tokenize!r}")
    return _of_sentences(_metrics().BLEU(effective_order=True, tokenize=tokenize).sentence_score)


def _of_sentences(score: Callable) -> Score:
    return lambda prompt, answer, reference, row: float(score(answer, [reference]).score)


def _metrics() -> Any:
    try:
        from sacrebleu import metrics  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise StageError(
            f"the scorers chrf and bleu need sacrebleu ({error}); install it with `pip install 'peftcore[scorers]'`, "
            "or remove them from evaluate.scorers"
        ) from error
    return metrics
