"""Regular expressions that come with an adapter, from whoever made it: matched with a limit on the time they may take.

`(a+)+$` against a long module path takes longer than anybody lives, in `re` and so in PEFT. What repeats or branches is
therefore matched by `regex`, which can stop; everything else by `re`, whose time for it is bounded.
"""

import math
import re
import threading
import time
from functools import lru_cache

import regex

from peftcore.errors import ConfigError

LONGEST = 20_000
"""Characters of one pattern."""
MOST_COPIES = 10_000
"""Product of all counts such as {3,5} in one pattern; `regex` writes out what they repeat."""
SECONDS = 0.5
"""Processor time that all the slow matches of one pattern may take; a match of an honest one takes microseconds."""
_SLOW = 1e-3
_MOST_SLOW = 1000
"""Slow patterns that are remembered."""
_BRANCHES = re.compile(r"[*+?{|]")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_PLAIN = re.compile(r"[\w.]+")
SEGMENTS = r"(?:.*\.)?"
"""What may stand before a pattern that means the end of a path."""
_spent: dict[str, float] = {}
_lock = threading.Lock()


@lru_cache(maxsize=4096)
def compiled(pattern: str, before: str = "", after: str = "") -> "re.Pattern[str] | regex.Pattern[str]":
    """A pattern ready to match, between two of ours. Raises ValueError, with the reason, for one that cannot be."""
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, and {LONGEST:,} are the most")
    whole = f"{before}(?:{pattern}){after}" if before or after else pattern
    try:
        re.compile(pattern)  # alone, or it could end ours
        plain = re.compile(whole)
        if math.prod(max(int(n or 1) for n in counts) or 1 for counts in _COUNT.findall(pattern)) > MOST_COPIES:
            raise ValueError(f"its counted repetitions make more than {MOST_COPIES:,} copies")
        return regex.compile(whole) if branches(pattern) else plain
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError, FutureWarning) as error:
        raise ValueError(str(error)) from error


def matched(pattern: str, path: str, before: str = "", after: str = "") -> "re.Match[str] | regex.Match[str] | None":
    """The match of a pattern, between two of ours, with the whole of a path, if it is one.

    Raises ConfigError for what is no pattern, and for one whose matches take too long.
    """
    try:
        ready = compiled(pattern, before, after)
    except ValueError as error:
        raise ConfigError(f"{pattern!r:.200} is no regular expression ({error}); give a list of names") from error
    if isinstance(ready, re.Pattern):
        return ready.fullmatch(path)
    begun = time.thread_time()
    try:
        found = ready.fullmatch(path, timeout=SECONDS)
    except TimeoutError as error:
        raise _takes_too_long(pattern) from error
    took = time.thread_time() - begun
    if took > _SLOW and _total(pattern, took) > SECONDS:
        raise _takes_too_long(pattern)
    return found


def branches(pattern: str) -> bool:
    """Whether a pattern repeats anything or chooses between branches, so that matching it may take long."""
    return _BRANCHES.search(pattern) is not None


def is_suffix(pattern: str, path: str) -> bool:
    """Whether a path ends in whole segments that match the pattern, in which a dot is any character."""
    if not _PLAIN.fullmatch(pattern):
        return matched(pattern, path, before=SEGMENTS) is not None
    length = len(pattern)
    if len(path) < length or (len(path) > length and path[-length - 1] != "."):
        return False
    tail = path[-length:]
    return tail == pattern or ("." in pattern and all(p in (c, ".") for p, c in zip(pattern, tail, strict=True)))


def _total(pattern: str, took: float) -> float:
    with _lock:
        if len(_spent) >= _MOST_SLOW:
            _spent.clear()
        _spent[pattern] = _spent.get(pattern, 0.0) + took
        return _spent[pattern]


def _takes_too_long(pattern: str) -> ConfigError:
    return ConfigError(
        f"the regular expression {pattern!r:.200} takes more than {SECONDS} s to match the modules' paths; "
        "write it without repetitions of repetitions, or give a list of names"
    )
