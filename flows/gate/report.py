"""The report of a promotion as Markdown, for a pull request or a CI summary."""

import re

from flows.gate.promote import Promotion

_MARKS = {True: "✅", False: "❌"}


def as_markdown(promotion: Promotion) -> str:
    """Return the verdict, the champion, and each check with its detail as Markdown."""
    lines = [f"## {_MARKS[promotion.accepted]} {_escaped(promotion.sentence)}", ""]
    report = promotion.report
    if report is None:
        return "\n".join([*lines, "No gate report: the stage was assigned by hand.", ""])
    lines += [f"Compared with: {report.champion or 'nothing, the stage was free'}.", ""]
    lines += ["| check | | measured, and the limit |", "|---|---|---|"]
    lines += [f"| {_escaped(c.name)} | {_MARKS[c.passed]} | {_escaped(c.detail)} |" for c in report.checks]
    if not report.passed:
        lines += ["", "Checks that depend on a failed check, and comparisons with the champion, were skipped."]
    if promotion.tag is not None:
        lines += ["", f"Tag: `{promotion.tag}`"]
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    """Escape text for Markdown: a detail may hold names from the data, which must not become links or mentions."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;").replace("#", "&#35;")
    text = re.sub(r"([\\`*_\[\]!|~])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", text)
