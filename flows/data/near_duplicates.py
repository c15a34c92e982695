"""Near-duplicates: texts that share most of their runs of words, found by MinHash and locality-sensitive hashing.

J(a, b) = |A ∩ B| / |A ∪ B| over the sets A, B of runs of five words (Broder 1997). Hashing proposes candidates, and J
of the sets themselves decides, so nothing that it finds is only probably one. A run of words that stands in a fifth of
the texts is their common frame (a system prompt, the instruction of every row) and does not count.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import numpy
from datasketch import MinHash, MinHashLSH

WORDS = 5
"""Words of a run."""
COMMON = 0.2
"""Share of the texts from which a run is their frame."""
PERMUTATIONS = 128
RECALL = 0.999
"""How surely two that are just similar enough become candidates; a false candidate costs one comparison."""
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
        self._runs = _without_frame([_runs(text) for text in texts])
        low_halves = ((runs & 0xFFFFFFFF).tolist() for runs in self._runs)
        self._hashes = MinHash.bulk(low_halves, num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(similarity))
        for number, hashes in enumerate(self._hashes):
            self._index.insert(number, hashes)

    def nearest(self, text: int, among: Collection[int] | Callable[[int], bool]) -> Near | None:
        """The text most similar to the given one of those `among`, if one is similar enough."""
        allowed = among if callable(among) else among.__contains__
        candidates = sorted(cast(list[int], self._index.query(self._hashes[text])))
        found = [Near(other, self._jaccard(text, other)) for other in candidates if other != text and allowed(other)]
        return max((near for near in found if near.similarity >= self.similarity), key=lambda n: n[1], default=None)

    def _jaccard(self, one: int, other: int) -> float:
        a, b = self._runs[one], self._runs[other]
        shared = len(numpy.intersect1d(a, b, assume_unique=True))
        return shared / (len(a) + len(b) - shared)


def _bands(similarity: float) -> tuple[int, int]:
    """How many bands of how many hashes: the longest that let a pair of J = s share one with RECALL.

    Of b bands of r hashes it shares one with 1 − (1 − sʳ)ᵇ.
    """
    lengths = range(PERMUTATIONS // 2, 0, -1)
    r = next((r for r in lengths if 1 - (1 - similarity**r) ** (PERMUTATIONS // r) >= RECALL), 1)
    return PERMUTATIONS // r, r


def _runs(text: str) -> numpy.ndarray:
    """The 64-bit hashes of a text's runs of words, each once; a shorter text is one run."""
    words = _WORD.findall(text.lower())
    joined = {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in joined)
    return numpy.unique(numpy.frombuffer(digests, "<u8"))


def _without_frame(texts: list[numpy.ndarray]) -> list[numpy.ndarray]:
    """The runs of each text without those of the frame; a text that is nothing but frame keeps its own."""
    if not texts:
        return texts
    runs, counts = numpy.unique(numpy.concatenate(texts), return_counts=True)
    frame = runs[counts > max(3, COMMON * len(texts))]
    rest = [numpy.setdiff1d(text, frame, assume_unique=True) for text in texts]
    return [own if len(own) else text for own, text in zip(rest, texts, strict=True)]
