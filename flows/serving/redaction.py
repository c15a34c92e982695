"""Redaction rules of a YAML file, for the records of a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from peftcore.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from peftcore.serving import Redaction, Rule

REPLACEMENT = "<redacted>"


def read_redaction(path: Path) -> "Redaction":
    """Return the rules of a file: a list of built-in names, and of mappings with `pattern` and `replacement`.

    Raises:
        ConfigError: The file is not such a list, a name is unknown, or a pattern is not valid; names the entry.
    """
    from peftcore.serving import Redaction

    try:
        entries = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: give a list of rules, such as `- email` or `- {{pattern: 'T-[0-9]+'}}`")
    return Redaction([_rule(entry, f"{path}, rule {number}") for number, entry in enumerate(entries, start=1)])


def _rule(entry: Any, where: str) -> "Rule":
    from peftcore.serving import REDACTIONS, Rule

    if isinstance(entry, str):
        if entry not in REDACTIONS:
            raise ConfigError(f"{where}: there is no rule {entry!r}{suggestion(entry, REDACTIONS)}")
        return REDACTIONS[entry]
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str):
        raise ConfigError(f"{where}: give a built-in name or {{pattern: ..., replacement: ...}}, not {entry!r:.80}")
    if unknown := sorted(set(entry) - {"pattern", "replacement"}, key=str):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}{suggestion(str(unknown[0]), ['replacement'])}")
    replacement = entry.get("replacement", REPLACEMENT)
    if not isinstance(replacement, str):
        raise ConfigError(f"{where}: replacement is {replacement!r:.80}; give text in quotation marks")
    try:
        return Rule(entry["pattern"], replacement)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
