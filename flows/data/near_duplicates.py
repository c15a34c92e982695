"""Near-duplicates: texts that share most of their word runs, and short texts that differ in one word.

J(a, b) = |A ∩ B| / |A ∪ B| over the sets A, B of runs of five words (Broder 1997). MinHash and locality-sensitive
hashing propose candidates, and J of the exact sets decides, so no match is only probable. A run that occurs in a fifth
of the texts is boilerplate (a system prompt, an instruction in every row) and does not count.

One changed word changes five runs, which is most of a short text. Short texts are therefore also compared with each
word left out (deletion neighbourhoods, as in SymSpell), which finds texts that differ by one changed, added or removed
word. Their similarity is 1 − 1/n, where n is the number of words of the shorter text that are not boilerplate. For rows
such as "Is 7 prime?", which differ only in the number, n is one, so no two are near-duplicates.

Spelling (`flows.data.canonical`) and capitals do not count.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import numpy
from datasketch import MinHash, MinHashLSH
from numpy.lib.stride_tricks import sliding_window_view

from flows.data.canonical import canonical

WORDS = 5
"""Words of a run."""
COMMON = 0.2
"""Share of the texts from which a run or word is boilerplate."""
PERMUTATIONS = 128
RECALL = 0.999
"""Probability that a pair at the similarity limit becomes a candidate; a false candidate costs one comparison."""
_BASE = numpy.uint64(0x9E3779B97F4A7C15)
"""Odd, so that its powers never vanish modulo 2⁶⁴."""
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
"""A word, a character of a script without spaces between words, or a punctuation mark."""


class Near(NamedTuple):
    """Another text's index and its similarity (0 to 1)."""

    text: int
    similarity: float


class NearDuplicates:
    """Index of texts for near-duplicate search. similarity: the smallest J of near-duplicates, above 0."""

    def __init__(self, texts: Sequence[str], similarity: float) -> None:
        self.similarity = similarity
        words = [_words(text) for text in texts]
        runs = [_runs(text) for text in words]
        frame = _frame([numpy.unique(text) for text in runs])
        self._runs = _without(runs, frame)
        low_halves = ((text & 0xFFFFFFFF).tolist() for text in self._runs)
        self._hashes = MinHash.bulk(low_halves, num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(similarity))
        for number, hashes in enumerate(self._hashes):
            self._index.insert(number, hashes)
        self._one_word_apart = _OneWordApart(words, runs, frame, [self._is_short(text) for text in self._runs])

    def nearest(self, text: int, among: Collection[int] | Callable[[int], bool]) -> Near | None:
        """Return the text among `among` that is most similar to `text`; None if none is similar enough."""
        allowed = among if callable(among) else among.__contains__
        similarities = {
            other: self._jaccard(text, other) for other in cast(list[int], self._index.query(self._hashes[text]))
        }
        for other, similarity in self._one_word_apart.of(text).items():
            similarities[other] = max(similarity, similarities.get(other, 0.0))
        near = (Near(*one) for one in sorted(similarities.items()) if one[0] != text and allowed(one[0]))
        return max((one for one in near if one.similarity >= self.similarity), key=lambda one: one[1], default=None)

    def _is_short(self, runs: numpy.ndarray) -> bool:
        """Return True if one changed word, which changes WORDS runs in both texts, would take J below the limit."""
        return len(runs) * (1 - self.similarity) < WORDS * (1 + self.similarity)

    def _jaccard(self, one: int, other: int) -> float:
        a, b = self._runs[one], self._runs[other]
        shared = len(numpy.intersect1d(a, b, assume_unique=True))
        return shared / (len(a) + len(b) - shared)


class _OneWordApart:
    """Index of short texts that differ in one word: changed, added or removed."""

    def __init__(
        self,
        words: Sequence[numpy.ndarray],
        runs: Sequence[numpy.ndarray],
        frame: numpy.ndarray,
        is_short: Sequence[bool],
    ) -> None:
        self._words = words
        common = _frame([numpy.unique(text) for text in words])
        self._own_words = [int((~numpy.isin(text, common)).sum()) for text in words]
        self._variants: list[list[int]] = []
        self._texts: dict[int, list[int]] = defaultdict(list)
        for number, (text, text_runs, short) in enumerate(zip(words, runs, is_short, strict=True)):
            variants = _variants(text, numpy.isin(text_runs, frame)) if short else []
            self._variants.append(variants)
            for variant in variants:
                self._texts[variant].append(number)

    def of(self, text: int) -> dict[int, float]:
        """Return {index of a text that differs in one word: similarity}."""
        candidates = {other for variant in self._variants[text] for other in self._texts[variant]}
        return {
            other: 1 - 1 / max(1, min(self._own_words[text], self._own_words[other]))
            for other in candidates
            if _is_one_word_apart(self._words[text], self._words[other])
        }


def _is_one_word_apart(one: numpy.ndarray, other: numpy.ndarray) -> bool:
    """Return True if the common start and the common end leave at most one word of either text."""
    if abs(len(one) - len(other)) > 1:
        return False
    least = min(len(one), len(other))
    head = int(numpy.append(one[:least] != other[:least], True).argmax())
    tail = int(numpy.append((one[::-1][:least] != other[::-1][:least])[: least - head], True).argmax())
    return head + tail >= max(len(one), len(other)) - 1


def _variants(words: numpy.ndarray, is_frame: numpy.ndarray) -> list[int]:
    """Return the hashes of a text: of the whole text, and of the text without one word, for each word that may differ.

    A word may differ if a run of WORDS words that is not boilerplate contains it, or if every run is boilerplate.
    is_frame: for each run, True if the run is boilerplate. The hash of words w is Σ wᵢ·Bⁱ modulo 2⁶⁴, so the hashes
    without one word follow from sums over the words before and after.
    """
    with numpy.errstate(over="ignore"):
        powers = numpy.cumprod(numpy.full(len(words) + 1, _BASE), dtype=numpy.uint64)
        before = numpy.concatenate([numpy.zeros(1, numpy.uint64), numpy.cumsum(words * powers[1:], dtype=numpy.uint64)])
        moved = numpy.cumsum((words * powers[:-1])[::-1], dtype=numpy.uint64)[::-1]  # as if shifted left by one
        after = numpy.concatenate([moved[1:], numpy.zeros(1, numpy.uint64)])
        without = before[:-1] + after
    covered = numpy.zeros(len(words), bool)
    for place in numpy.flatnonzero(~is_frame) if not is_frame.all() else range(len(is_frame)):
        covered[place : place + WORDS] = True
    return sorted({int(before[-1]), *without[covered].tolist()})


def _bands(similarity: float) -> tuple[int, int]:
    """Return (bands, hashes per band): the longest bands that let a pair of J = s share one with probability RECALL.

    With b bands of r hashes the probability is 1 − (1 − sʳ)ᵇ.
    """
    lengths = range(PERMUTATIONS // 2, 0, -1)
    r = next((r for r in lengths if 1 - (1 - similarity**r) ** (PERMUTATIONS // r) >= RECALL), 1)
    return PERMUTATIONS // r, r


def _words(text: str) -> numpy.ndarray:
    """Return the 64-bit hashes of a text's words, in order."""
    words = _WORD.findall(canonical(text).lower())
    return numpy.frombuffer(b"".join(map(_word_digest, words)), "<u8")


def _runs(words: numpy.ndarray) -> numpy.ndarray:
    """Return the 64-bit hashes of a text's word runs, in order; a shorter text is one run.

    The hash of a run w is Σ wᵢ·Bⁱ modulo 2⁶⁴.
    """
    length = min(WORDS, len(words))
    if not length:
        return numpy.zeros(1, numpy.uint64)
    powers = numpy.cumprod(numpy.full(length, _BASE), dtype=numpy.uint64)
    return sliding_window_view(words, length) @ powers


@lru_cache(1 << 18)
def _word_digest(word: str) -> bytes:
    return hashlib.blake2b(word.encode(), digest_size=8).digest()


def _frame(texts: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return the hashes that occur in so many texts that they are boilerplate. texts: unique hashes of each."""
    if not texts:
        return numpy.zeros(0, numpy.uint64)
    values, counts = numpy.unique(numpy.concatenate(texts), return_counts=True)
    return values[counts > max(3, COMMON * len(texts))]


def _without(texts: Sequence[numpy.ndarray], frame: numpy.ndarray) -> list[numpy.ndarray]:
    """Return each text's unique runs without boilerplate; a text of boilerplate alone keeps its runs."""
    every = [numpy.unique(text) for text in texts]
    rest = [numpy.setdiff1d(text, frame, assume_unique=True) for text in every]
    return [unique if len(unique) else text for unique, text in zip(rest, every, strict=True)]
