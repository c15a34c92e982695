"""A promotion as Markdown, for a pull request or a CI summary."""

import re

from flows.gate.promote import Promotion

_MARKS = {True: "✅", False: "❌"}


def as_markdown(promotion: Promotion) -> str:
    """The verdict, the champion it was compared with, and each check with what was found and what is allowed."""
    lines = [f"## {_MARKS[promotion.accepted]} {_escaped(promotion.sentence)}", ""]
    report = promotion.report
    if report is None:
        return "\n".join([*lines, "No gate report: the stage was given by hand.", ""])
    lines += [f"Compared with: {report.champion or 'nothing, the stage was free'}.", ""]
    lines += ["| check | | found, and what is allowed |", "|---|---|---|"]
    lines += [f"| {_escaped(c.name)} | {_MARKS[c.passed]} | {_escaped(c.detail)} |" for c in report.checks]
    if not report.passed:
        lines += ["", "Checks that need what failed, and comparisons with the champion after a failure, were not made."]
    if promotion.tag is not None:
        lines += ["", f"Tag: `{promotion.tag}`"]
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is.

    A detail may hold names that come from data, such as a slice's. So no character of it begins a link, an image, a
    mention, a heading or a table cell on the page of a pull request.
    """
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;").replace("#", "&#35;")
    text = re.sub(r"([\\`*_\[\]!|~])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", text)
