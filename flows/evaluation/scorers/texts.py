"""Built-in scorers that compare texts. Each function takes the scorer's options and returns the scorer."""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import regex as bounded

Score = Callable[[str, str, str, dict[str, Any]], float]
"""Function of (prompt, answer, reference, row) that returns a number."""
REGEX_SECONDS = 1.0
"""Maximum time of a regular expression on one answer."""
FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)```", re.DOTALL)
"""A fenced block of Markdown; the group is its content."""


def exact_match(*, normalize: bool = False) -> Score:
    """Return a scorer: 1 if answer and reference are equal without white space at their ends, else 0.

    Args:
        normalize: Compare as SQuAD does: in lower case, without punctuation, English articles and repeated spaces.
    """
    form = normalized if normalize else str.strip
    return lambda prompt, answer, reference, row: float(form(answer) == form(reference))


def regex(*, pattern: str, whole: bool = False) -> Score:
    """Return a scorer: 1 if the answer matches, else 0. A match that takes over a second raises TimeoutError.

    Args:
        pattern: A regular expression.
        whole: The whole answer has to match, not a part of it.
    """
    try:
        compiled = bounded.compile(pattern)
    except bounded.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    match = compiled.fullmatch if whole else compiled.search
    return lambda prompt, answer, reference, row: float(match(answer.strip(), timeout=REGEX_SECONDS) is not None)


def token_f1() -> Score:
    """Return a scorer: the F1 of the words that answer and reference share, as in SQuAD (0 to 1)."""

    def score(prompt: str, answer: str, reference: str, row: dict[str, Any]) -> float:
        ours, theirs = normalized(answer).split(), normalized(reference).split()
        shared = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0

    return score


def length(*, unit: Literal["words", "characters"] = "words") -> Score:
    """Return a scorer: the length of the answer.

    Args:
        unit: words (separated by white space) or characters.
    """
    if unit not in ("words", "characters"):
        raise ValueError(f"unit is {unit!r}; give words or characters")
    return lambda prompt, answer, reference, row: float(len(answer.split() if unit == "words" else answer))


def rouge_l() -> Score:
    """Return a scorer: the F-measure of ROUGE-L (0 to 1)."""
    from flows.evaluation.scoring import rouge_l as of_all

    return lambda prompt, answer, reference, row: of_all([reference], [answer])[0]


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: in lower case, without punctuation, English articles and repeated spaces."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def unfenced(answer: str) -> str:
    """Return the content of the answer's first fenced block; the whole answer if it has none."""
    block = FENCED.search(answer)
    return answer if block is None else block[1]
