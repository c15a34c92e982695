"""Redaction rules that a YAML file gives."""

from pathlib import Path

import pytest

from flows.serving.redaction import read_redaction
from peftcore.errors import ConfigError


def test_names_and_patterns_are_applied_in_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "redact.yaml"
    path.write_text("- email\n- {pattern: 'T-[0-9]+'}\n- {pattern: 'Ada|Bob', replacement: <name>}\n")
    assert read_redaction(path)("Ada (ada@example.org) has T-17") == "<name> (<email>) has <redacted>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "give a list of rules"),
        ("email\n", "give a list of rules"),
        ("- [\n", "cannot be read as YAML"),
        ("- email\n- emial\n", "rule 2: there is no rule 'emial'; did you mean 'email'"),
        ("- {pattern: 'T-('}\n", "rule 1: the pattern 'T-\\(' .* is not valid: .*at position"),
        ("- {pattern: 'a*'}\n", "rule 1: the pattern 'a\\*' matches the empty text"),
        ("- {pattern: a, replacment: b}\n", "rule 1: unknown key 'replacment'; did you mean 'replacement'"),
        ("- {pattern: a, replacement: 1}\n", "rule 1: replacement is 1; give text"),
        ("- {replacement: b}\n", "rule 1: give a built-in name or"),
        ("- 3\n", "rule 1: give a built-in name or"),
    ],
)
def test_what_is_no_rule_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "redact.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_redaction(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_redaction(tmp_path / "missing.yaml")
