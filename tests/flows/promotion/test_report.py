"""The Markdown of a promotion: verdict, every check made, and no text that breaks the table."""

from flows.promotion.gate import Check, GateReport
from flows.promotion.promote import Promotion
from flows.promotion.report import as_markdown


def promotion(outcome: str, *checks: Check, champion: str | None = "v0.1.0", tag: str | None = None) -> Promotion:
    return Promotion("docs", "v0.2.0", "champion", outcome, tag, GateReport("v0.2.0", champion, checks))  # type: ignore[arg-type]


def test_a_pass() -> None:
    text = as_markdown(promotion("promoted", Check("manifest", True, "3 files"), tag="docs#champion#2"))
    assert text == (
        "## ✅ docs v0.2.0 is champion\n\nCompared with: v0.1.0.\n\n| check | | found, and what is allowed |\n"
        "|---|---|---|\n| manifest | ✅ | 3 files |\n\nTag: `docs#champion#2`\n"
    )


def test_a_refusal_says_why_and_cannot_break_out_of_its_cell() -> None:
    bad = Check("allowed files", False, "a|b <script>\n| x |.bin & more")
    text = as_markdown(promotion("refused", Check("manifest", True, "fine"), bad, champion=None))
    assert text.startswith("## ❌ docs v0.2.0 is not promoted to champion: allowed files: a\\|b &lt;script>")
    assert "| allowed files | ❌ | a\\|b &lt;script> \\| x \\|.bin &amp; more |" in text.splitlines()
    assert "Compared with: nothing, the stage was free." in text and "were not made" in text


def test_a_stage_given_by_hand() -> None:
    text = as_markdown(Promotion("docs", "v0.2.0", "champion", "already", None, None))
    assert "docs v0.2.0 is champion already" in text and "given by hand" in text
