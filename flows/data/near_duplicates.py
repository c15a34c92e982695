"""Near-duplicates: texts that share most of their runs of words, and short texts that differ in one word.

J(a, b) = |A ∩ B| / |A ∪ B| over the sets A, B of runs of five words (Broder 1997). MinHash and locality-sensitive
hashing propose candidates, and J of the sets themselves decides, so nothing that it finds is only probably one. A run
of words that stands in a fifth of the texts is their common frame (a system prompt, the instruction of every row) and
does not count.

One changed word changes five runs, which in a short text is most of them. Texts that short are therefore also compared
with each word left out in turn (the deletion neighbourhoods of SymSpell), which proposes those that one word changed,
added or left out makes equal. Their similarity is 1 − 1/n, where n counts the words of the shorter text that are not in
a fifth of the texts. In rows such as "Is 7 prime?", which differ in the number alone, n is one, so no two are alike.

Spelling does not count (`flows.data.canonical`), nor do capitals.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import numpy
from datasketch import MinHash, MinHashLSH

from flows.data.canonical import canonical

WORDS = 5
"""Words of a run."""
COMMON = 0.2
"""Share of the texts from which a run is their frame."""
PERMUTATIONS = 128
RECALL = 0.999
"""How surely two that are just similar enough become candidates; a false candidate costs one comparison."""
_BASE = numpy.uint64(0x9E3779B97F4A7C15)
"""Odd, so that its powers never vanish modulo 2⁶⁴."""
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
"""A word, a character of a script that puts no spaces between words, or a punctuation mark."""


class Near(NamedTuple):
    """Another text's number and how similar it is, 0 to 1."""

    text: int
    similarity: float


class NearDuplicates:
    """An index of texts; similarity: the least J of two that are near-duplicates, above 0."""

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
        """The text most similar to the given one of those `among`, if one is similar enough."""
        allowed = among if callable(among) else among.__contains__
        found = {other: self._jaccard(text, other) for other in cast(list[int], self._index.query(self._hashes[text]))}
        for other, similarity in self._one_word_apart.of(text).items():
            found[other] = max(similarity, found.get(other, 0.0))
        near = (Near(*one) for one in sorted(found.items()) if one[0] != text and allowed(one[0]))
        return max((one for one in near if one.similarity >= self.similarity), key=lambda one: one[1], default=None)

    def _is_short(self, runs: numpy.ndarray) -> bool:
        """Whether J would fall below the limit by one changed word, which changes WORDS runs in each of two texts."""
        return len(runs) * (1 - self.similarity) < WORDS * (1 + self.similarity)

    def _jaccard(self, one: int, other: int) -> float:
        a, b = self._runs[one], self._runs[other]
        shared = len(numpy.intersect1d(a, b, assume_unique=True))
        return shared / (len(a) + len(b) - shared)


class _OneWordApart:
    """Which short texts one word tells apart: another, one more or one fewer."""

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
        for number, (text, of, short) in enumerate(zip(words, runs, is_short, strict=True)):
            variants = _variants(text, numpy.isin(of, frame)) if short else []
            self._variants.append(variants)
            for variant in variants:
                self._texts[variant].append(number)

    def of(self, text: int) -> dict[int, float]:
        """{another text: similarity}"""
        candidates = {other for variant in self._variants[text] for other in self._texts[variant]}
        return {
            other: 1 - 1 / max(1, min(self._own_words[text], self._own_words[other]))
            for other in candidates
            if _is_one_word_apart(self._words[text], self._words[other])
        }


def _is_one_word_apart(one: numpy.ndarray, other: numpy.ndarray) -> bool:
    """Whether what both begin with and what both end with leave at most a word of either."""
    if abs(len(one) - len(other)) > 1:
        return False
    least = min(len(one), len(other))
    head = int(numpy.append(one[:least] != other[:least], True).argmax())
    tail = int(numpy.append((one[::-1][:least] != other[::-1][:least])[: least - head], True).argmax())
    return head + tail >= max(len(one), len(other)) - 1


def _variants(words: numpy.ndarray, is_frame: numpy.ndarray) -> list[int]:
    """Hashes of a text as it is, and without each word that a run outside of the frame covers.

    is_frame: of each run, by its place. A hash is Σ wᵢ·Bⁱ modulo 2⁶⁴, so that leaving one out costs no second pass.
    """
    with numpy.errstate(over="ignore"):
        powers = numpy.cumprod(numpy.full(len(words) + 1, _BASE), dtype=numpy.uint64)
        before = numpy.concatenate([numpy.zeros(1, numpy.uint64), numpy.cumsum(words * powers[1:], dtype=numpy.uint64)])
        moved = numpy.cumsum((words * powers[:-1])[::-1], dtype=numpy.uint64)[::-1]  # as if one place further left
        after = numpy.concatenate([moved[1:], numpy.zeros(1, numpy.uint64)])
        without = before[:-1] + after
    covered = numpy.zeros(len(words), bool)
    for place in numpy.flatnonzero(~is_frame) if not is_frame.all() else range(len(is_frame)):
        covered[place : place + WORDS] = True
    return sorted({int(before[-1]), *without[covered].tolist()})


def _bands(similarity: float) -> tuple[int, int]:
    """How many bands of how many hashes: the longest that let a pair of J = s share one with RECALL.

    Of b bands of r hashes it shares one with 1 − (1 − sʳ)ᵇ.
    """
    lengths = range(PERMUTATIONS // 2, 0, -1)
    r = next((r for r in lengths if 1 - (1 - similarity**r) ** (PERMUTATIONS // r) >= RECALL), 1)
    return PERMUTATIONS // r, r


def _words(text: str) -> numpy.ndarray:
    """The 64-bit hashes of a text's words, in their order."""
    words = _WORD.findall(canonical(text).lower())
    return numpy.frombuffer(b"".join(map(_digest, words)), "<u8")


def _runs(words: numpy.ndarray) -> numpy.ndarray:
    """The 64-bit hashes of a text's runs of words, by their place; a shorter text is one run."""
    content, size = words.tobytes(), words.itemsize
    starts = range(0, size * max(1, len(words) - WORDS + 1), size)
    return numpy.frombuffer(b"".join(_digest(content[at : at + size * WORDS]) for at in starts), "<u8")


def _digest(content: str | bytes) -> bytes:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=8).digest()


def _frame(texts: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """What stands in so many of the texts that it tells none from another. texts: each with its hashes once."""
    if not texts:
        return numpy.zeros(0, numpy.uint64)
    values, counts = numpy.unique(numpy.concatenate(texts), return_counts=True)
    return values[counts > max(3, COMMON * len(texts))]


def _without(texts: Sequence[numpy.ndarray], frame: numpy.ndarray) -> list[numpy.ndarray]:
    """Each text's own runs, each once; a text that is nothing but frame keeps all."""
    every = [numpy.unique(text) for text in texts]
    rest = [numpy.setdiff1d(text, frame, assume_unique=True) for text in every]
    return [own if len(own) else text for own, text in zip(rest, every, strict=True)]
