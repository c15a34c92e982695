"""Rows and findings in the terminal: prompts dim, supervised text green, rejected and undesirable text red."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from flows.data.encoders import Kind
from flows.data.report import segments
from flows.data.rows import Row, read_rows
from flows.data.tokens import IGNORED
from flows.validation.findings import Findings

LEARNED, CONTEXT, REJECTED = "green", "dim", "red"
_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


def preview(path: Path, tokenizer: PreTrainedTokenizerBase, kind: Kind, count: int) -> Iterator[Group]:
    """Yield the first `count` rows of a split, each below a line with its length and supervised tokens."""
    for row in read_rows(path, limit=count) if count else []:
        yield Group(Rule(_title(row, kind), align="left", style="dim"), *_texts(row, tokenizer, kind))


def findings_table(findings: Findings) -> Table:
    """Return a table of all checks with figures and fixes, worst first."""
    table = Table("check", "", "result")
    for finding in findings.of("error", "warning", "ok"):
        lines = [escape(finding.figure)]
        if finding.fix:
            lines.append(f"[yellow]{escape(finding.fix)}[/]")
        lines += [f"[dim]{escape(example)}[/]" for example in finding.examples]
        table.add_row(finding.check, _MARKS[finding.severity], "\n".join(lines))
    return table


def _title(row: Row, kind: Kind) -> str:
    tokens = {name.removesuffix("input_ids"): len(ids) for name, ids in row.items() if name.endswith("input_ids")}
    learned = [sum(label != IGNORED for label in row[f"{name}labels"]) for name in tokens if f"{name}labels" in row]
    of = " and ".join(map(str, tokens.values()))
    supervised = f", {' and '.join(map(str, learned))} supervised" if learned else ""
    return f"{row['id']} · {escape(row['group'])} · {of} tokens{supervised} · weight {row['weight']:g}"


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> list[Text]:
    if kind == "classification":
        return [Text.assemble((row["text"], CONTEXT), (f" → {row['label_name']}", LEARNED))]
    if kind == "token_classification":
        pairs = zip(row["tokens"], row["tags"].split(), strict=True)
        parts = [part for word, tag in pairs for part in ((f"{word}/", CONTEXT), (f"{tag} ", LEARNED))]
        return [Text.assemble(*parts)]
    if kind == "seq2seq":
        return [Text.assemble((row["prompt"], CONTEXT), (f" → {row['target']}", LEARNED))]
    if kind == "retrieval":
        texts = [(row["query"], CONTEXT), (row["positive"], LEARNED), *((text, REJECTED) for text in row["negatives"])]
        return [Text.assemble(text) for text in texts]
    if kind in ("chat", "text"):
        return [_coloured(row, "", tokenizer, CONTEXT, LEARNED)]
    if kind == "unpaired_preference":
        return [_coloured(row, "", tokenizer, CONTEXT, LEARNED if row["desirable"] else REJECTED)]
    return [
        _coloured(row, "chosen_", tokenizer, CONTEXT, LEARNED),
        _coloured(row, "rejected_", tokenizer, None, REJECTED),
    ]


def _coloured(row: Row, prefix: str, tokenizer: PreTrainedTokenizerBase, context: str | None, learned: str) -> Text:
    """Return one sequence as coloured text; context None: without its prompt."""
    start = 0 if context else row["prompt_length"]
    sequence = (row[f"{prefix}input_ids"][start:], row[f"{prefix}labels"][start:])
    runs = segments(sequence, tokenizer)
    return Text.assemble(*((text, learned if supervised else context or CONTEXT) for text, supervised in runs))
