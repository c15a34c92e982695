"""In the terminal the prompt is dim, what is learned green, a rejected answer red."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from flows.validation.preview import findings_table, preview


def styled(patient: Any, kind: str) -> list[tuple[str, str]]:
    [group] = preview(patient.folder / "train.parquet", patient.tokenizer, kind, 1)
    texts = [part for part in group.renderables if isinstance(part, Text)]
    return [(text.plain[span.start : span.end], str(span.style)) for text in texts for span in text.spans]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("chat", [("more?", "dim"), ("1000.<|im_end|>", "green")]),
        ("preference", [("more?", "dim"), ("0, I do think.<|im_end|>", "green"), ("0.<|im_end|>", "red")]),
        ("unpaired_preference", [("more?", "dim"), ("1000.<|im_end|>", "green")]),
        ("classification", [("more?", "dim"), (" → even", "green")]),
        ("token_classification", [("Is/", "dim"), ("O", "green"), ("0/", "dim"), ("B-even", "green")]),
    ],
)
def test_colours_tell_what_is_learned(patient: Any, kind: str, parts: list[tuple[str, str]]) -> None:
    found = styled(patient(kind), kind)
    found = found[: len(parts)] if kind == "token_classification" else found
    assert [style for _, style in found] == [style for _, style in parts]
    for (shown, _), (text, _) in zip(found, parts, strict=True):
        assert text in shown


def test_an_undesirable_answer_is_red(patient: Any) -> None:
    ill = patient("unpaired_preference")
    ill.change("train", "desirable", lambda rows: [False] * len(rows))
    assert [style for _, style in styled(ill, "unpaired_preference")] == ["dim", "red"]


def test_none_can_be_asked_for(patient: Any) -> None:
    healthy = patient()
    assert list(preview(healthy.folder / "train.parquet", healthy.tokenizer, "chat", 0)) == []


def test_the_table_begins_with_the_worst(patient: Any) -> None:
    ill = patient()
    ill.change("train", "labels", lambda rows: [[*row[:-1], -100] for row in rows])
    console = Console(width=160, record=True, file=StringIO())
    console.print(findings_table(ill.examine()))
    first = console.export_text().splitlines()[3]
    assert "✗" in first
