"""The Markdown of a promotion: verdict, every check made, and no text that breaks the table."""

import re

import pytest
from markdown_it import MarkdownIt

from flows.gate.gate import Check, GateReport
from flows.gate.promote import Promotion
from flows.gate.report import as_markdown


def promotion(outcome: str, *checks: Check, champion: str | None = "v0.1.0", tag: str | None = None) -> Promotion:
    return Promotion("docs", "v0.2.0", "champion", outcome, tag, GateReport("v0.2.0", champion, checks))  # type: ignore[arg-type]


def test_a_pass() -> None:
    text = as_markdown(promotion("promoted", Check("manifest", True, "3 files"), tag="docs#champion#2"))
    assert text == (
        "## ✅ docs v0.2.0 is champion\n\nCompared with: v0.1.0.\n\n| check | | measured, and the limit |\n"
        "|---|---|---|\n| manifest | ✅ | 3 files |\n\nTag: `docs#champion#2`\n"
    )


def test_a_refusal_says_why_and_cannot_break_out_of_its_cell() -> None:
    bad = Check("allowed files", False, "a|b <script>\n| x |.bin & more")
    text = as_markdown(promotion("refused", Check("manifest", True, "fine"), bad, champion=None))
    assert text.startswith("## ❌ docs v0.2.0 is not promoted to champion: allowed files: a\\|b &lt;script>")
    assert "| allowed files | ❌ | a\\|b &lt;script> \\| x \\|.bin &amp; more |" in text.splitlines()
    assert "Compared with: nothing, the stage was free." in text and "were skipped" in text


@pytest.mark.parametrize(
    "name",
    [
        "![x](https://evil.test/pixel.png)", "[click](https://evil.test)", "https://evil.test/a", "www.evil.test",
        "@everyone", "#123", "`code`", "**bold** _it_", "<img src=x>", "a\n\n# heading", "&lt;b>", "~~gone~~", "a|b",
    ],
)  # fmt: skip
def test_a_name_out_of_the_data_is_text_and_nothing_else(name: str) -> None:
    text = as_markdown(promotion("refused", Check("slices", False, name)))
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    children = [child.type for token in tokens if token.type == "inline" for child in token.children or ()]
    assert set(children) <= {"text", "text_special"} and len(children) > 4
    assert sum(token.type == "heading_open" for token in tokens) == 1
    # GitHub links bare addresses, mentions and numbers too
    assert not re.search(r"https?:/|www\.|(?<!&)[@#](?!\s|#)", text)


def test_a_stage_given_by_hand() -> None:
    text = as_markdown(Promotion("docs", "v0.2.0", "champion", "already", None, None))
    assert "docs v0.2.0 is champion already" in text and "assigned by hand" in text
