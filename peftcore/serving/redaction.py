"""Redaction of texts before they are recorded: patterns and their replacements, in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from peftcore.errors import ConfigError

SECONDS = 1.0
"""Time limit of one rule on one text (seconds); a pattern that backtracks without end must not stop the recorder."""


@dataclass(frozen=True)
class Rule:
    """A pattern (of the package `regex`) whose matches are replaced.

    Raises:
        ConfigError: The pattern is not valid, matches the empty text, or the replacement does not fit the pattern.
    """

    pattern: str
    replacement: str
    """Text in place of a match, with groups as in `re.sub`."""
    accepts: Callable[[str], bool] | None = None
    """Check of a match; a match that it rejects stays. None: every match is replaced."""

    def __post_init__(self) -> None:
        try:
            compiled = regex.compile(self.pattern)
            regex.sub(f"{self.pattern}|", self.replacement, "")  # checks the groups of the replacement
        except (regex.error, IndexError) as error:
            given = f"the pattern {self.pattern!r} with the replacement {self.replacement!r}"
            raise ConfigError(f"{given} is not valid: {error}") from error
        if compiled.match(""):
            raise ConfigError(
                f"the pattern {self.pattern!r} matches the empty text, so it would be inserted everywhere; use + in "
                "place of *"
            )

    def apply(self, text: str) -> str:
        """Return the text with all matches replaced. Raises TimeoutError after SECONDS."""

        def replaced(match: Any) -> str:
            return match.expand(self.replacement) if self.accepts is None or self.accepts(match[0]) else match[0]

        return regex.compile(self.pattern).sub(replaced, text, timeout=SECONDS)


def _is_card(digits: str) -> bool:
    """Return True if the check digit is right (Luhn's algorithm)."""
    numbers = [int(one) for one in digits if one.isdigit()]
    doubled = (sum(divmod(2 * one, 10)) for one in numbers[-2::-2])
    return (sum(numbers[-1::-2]) + sum(doubled)) % 10 == 0


BUILT_IN = {
    "email": Rule(r"(?i)\b[\p{L}\p{N}._%+-]{1,64}@(?:[\p{L}\p{N}-]{1,63}\.)+\p{L}{2,24}\b", "<email>"),
    "card": Rule(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d])", "<card>", _is_card),
    "iban": Rule(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", "<iban>"),
    "phone": Rule(r"(?<![\w+])(?:\+|00)[1-9](?:[ ()/.-]{0,2}\d){6,14}(?!\d)"
                  r"|(?<![\w.])\(?0?[1-9]\d{1,4}\)?[ /.-]\d{2,4}[ /.-]?\d{3,6}(?![\w])", "<phone>"),
    "ip": Rule(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])", "<ip>"),
}  # fmt: skip
"""Rules by name. Cards come before phones in a list that should replace both."""


class Redaction:
    """Rules that are applied in order. No rules: texts stay as they are."""

    def __init__(self, rules: Sequence[Rule] = ()):
        self._rules = tuple(rules)

    def __call__(self, text: str) -> str:
        """Return the redacted text. Raises TimeoutError if a rule takes longer than SECONDS."""
        for rule in self._rules:
            text = rule.apply(text)
        return text
