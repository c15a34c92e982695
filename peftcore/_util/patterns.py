"""Time-limited matching of regular expressions from untrusted adapter configurations.

Matching `(a+)+$` against a long module path takes exponential time in `re`, and therefore in HF PEFT. Patterns with
repetitions or branches are matched by `regex`, which has a timeout. All other patterns are matched by `re`, in time
that is bounded by their length.
"""

import math
import re
import threading
import time
from functools import lru_cache

import regex

from peftcore.errors import ConfigError

LONGEST = 20_000
"""Largest number of characters in a pattern."""
MOST_COPIES = 10_000
"""Largest product of all repetition counts such as {3,5} in a pattern; `regex` expands these repetitions."""
SECONDS = 0.5
"""Limit of the CPU time of all slow matches of one pattern together; an ordinary match takes microseconds."""
_SLOW = 1e-3
"""Seconds above which a match is slow."""
_MOST_SLOW = 1000
"""Largest number of slow patterns whose time is recorded."""
_BRANCHES = re.compile(r"[*+?{|]")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_PLAIN = re.compile(r"[\w.]+")
SEGMENTS = r"(?:.*\.)?"
"""Pattern for the path segments before a suffix."""
_spent: dict[str, float] = {}
_lock = threading.Lock()


@lru_cache(maxsize=4096)
def compiled(pattern: str, before: str = "", after: str = "") -> "re.Pattern[str] | regex.Pattern[str]":
    """Compile a pattern, with trusted patterns before and after it.

    Args:
        pattern: The untrusted pattern.
        before: A trusted pattern that must match in front.
        after: A trusted pattern that must match behind.

    Raises:
        ValueError: The pattern is invalid or too large; the message says why.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters; the limit is {LONGEST:,}")
    whole = f"{before}(?:{pattern}){after}" if before or after else pattern
    try:
        re.compile(pattern)  # alone, because an unbalanced parenthesis could close the group around it
        plain = re.compile(whole)
        if math.prod(max(int(n or 1) for n in counts) or 1 for counts in _COUNT.findall(pattern)) > MOST_COPIES:
            raise ValueError(f"its repetition counts expand to more than {MOST_COPIES:,} copies")
        return regex.compile(whole) if branches(pattern) else plain
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError, FutureWarning) as error:
        raise ValueError(str(error)) from error


def matched(pattern: str, path: str, before: str = "", after: str = "") -> "re.Match[str] | regex.Match[str] | None":
    """Match a pattern against a whole path.

    Args:
        pattern: The untrusted pattern.
        path: The module path to match.
        before: A trusted pattern that must match in front.
        after: A trusted pattern that must match behind.

    Returns:
        The match, or None.

    Raises:
        ConfigError: The pattern is invalid, or its matches take too long.
    """
    try:
        expression = compiled(pattern, before, after)
    except ValueError as error:
        raise ConfigError(
            f"{pattern!r:.200} is not a valid regular expression ({error}); give a list of names"
        ) from error
    if isinstance(expression, re.Pattern):
        return expression.fullmatch(path)
    start = time.thread_time()
    try:
        match = expression.fullmatch(path, timeout=SECONDS)
    except TimeoutError as error:
        raise _too_slow(pattern) from error
    seconds = time.thread_time() - start
    if seconds > _SLOW and _total_seconds(pattern, seconds) > SECONDS:
        raise _too_slow(pattern)
    return match


def branches(pattern: str) -> bool:
    """Return True if a pattern has repetitions or branches, so that matching it may be slow."""
    return _BRANCHES.search(pattern) is not None


def is_suffix(pattern: str, path: str) -> bool:
    """Return True if the pattern matches one or more whole segments at the end of the path.

    As in a regular expression, a dot in the pattern matches any character.
    """
    if not _PLAIN.fullmatch(pattern):
        return matched(pattern, path, before=SEGMENTS) is not None
    length = len(pattern)
    if len(path) < length or (len(path) > length and path[-length - 1] != "."):
        return False
    tail = path[-length:]
    return tail == pattern or ("." in pattern and all(p in (c, ".") for p, c in zip(pattern, tail, strict=True)))


def _total_seconds(pattern: str, seconds: float) -> float:
    """Add the seconds of a slow match to the pattern's total, and return the total."""
    with _lock:
        if len(_spent) >= _MOST_SLOW:
            _spent.clear()
        _spent[pattern] = _spent.get(pattern, 0.0) + seconds
        return _spent[pattern]


def _too_slow(pattern: str) -> ConfigError:
    return ConfigError(
        f"the regular expression {pattern!r:.200} takes more than {SECONDS} s to match the module paths; "
        "remove nested repetitions, or give a list of names"
    )
