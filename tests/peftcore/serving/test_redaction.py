"""Texts whose personal data are replaced before they are written."""

import pytest

from peftcore.errors import ConfigError
from peftcore.serving import redaction
from peftcore.serving.redaction import BUILT_IN, Redaction, Rule


@pytest.mark.parametrize(
    ("name", "text", "redacted"),
    [
        ("email", "Write to Jörg.Meier+a@mail.example.org, please.", "Write to <email>, please."),
        ("email", "an @ alone, user@host", "an @ alone, user@host"),
        ("card", "My card is 4111 1111 1111 1111.", "My card is <card>."),
        ("card", "5500-0000-0000-0004 and 4111111111111111", "<card> and <card>"),
        ("card", "order 4111 1111 1111 1112", "order 4111 1111 1111 1112"),  # its check digit is wrong
        ("iban", "DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", "<iban>, <iban>"),
        ("phone", "Call +49 (30) 901820-11 or 030 9018 2011.", "Call <phone> or <phone>."),
        ("phone", "0049 30 9018201; 212-555-0134", "<phone>; <phone>"),
        ("phone", "in 2026, 3.14159 and 1,024 rows of v1.2.3", "in 2026, 3.14159 and 1,024 rows of v1.2.3"),
        ("phone", "from 2026-11-28 on", "from 2026-11-28 on"),
        ("ip", "from 192.168.0.12 and 300.1.1.1", "from <ip> and 300.1.1.1"),
    ],
)
def test_built_in_rules(name: str, text: str, redacted: str) -> None:
    assert Redaction([BUILT_IN[name]])(text) == redacted


def test_rules_are_applied_in_order_with_groups() -> None:
    rules = [Rule(r"ticket (\d)\d+", r"ticket \1..."), Rule("Ada", "<name>")]
    assert Redaction(rules)("Ada has ticket 4711") == "<name> has ticket 4..."
    assert Redaction()("Ada") == "Ada"


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        ("T-(", "", "is not valid: .*at position"),
        ("T", r"\2", "is not valid: "),
        ("a*", "", "matches the empty text.*use \\+ in place of"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(pattern: str, replacement: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rule(pattern, replacement)


def test_a_pattern_that_backtracks_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "SECONDS", 0.05)
    with pytest.raises(TimeoutError):
        Redaction([Rule(r"(?:a|a)+(?:a|a)+(?:a|a)+b", "")])("a" * 200 + "c")
