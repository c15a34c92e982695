"""report.json: rows of the splits, dropped rows by reason, and some rows as the model sees them."""

from collections import Counter
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from flows.data.splits import Row, leakage
from flows.data.tokens import IGNORED, AnswerTokens, Sequence, TagTokens, TextTokens
from flows.params import Data
from flows.paths import Split

RENDERED = 5
"""Number of rows that are shown with their supervised part."""
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def data_report(
    data: Data,
    examples: int,
    available: dict[Split, int],
    splits: dict[Split, list[Row]],
    dropped: Counter[str],
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str],
) -> dict[str, Any]:
    """Return the report as JSON values; lengths are in tokens.

    Args:
        data: The section of params.yaml.
        examples: Number of examples in the source.
        available: Rows of each split before sampling.
        splits: Rows of each split.
        dropped: Number of dropped rows by reason.
        tokenizer: The base's tokenizer.
        labels: Names of the classes or tags; empty for other kinds.
    """
    shown = splits["train"][:RENDERED]
    return {
        "source": data.source,
        "kind": data.kind,
        "examples": examples,
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: _summary(rows, available[split]) for split, rows in splits.items()},
        "leakage": leakage(splits),
        **({"labels": labels} if labels else {}),
        "rendered": [{"id": row.tokens.id, "segments": runs} for row in shown for runs in _rendered(row, tokenizer)],
    }


def segments(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the text of a sequence in runs of (text, True if supervised)."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(*sequence, strict=True):
        supervised = label != IGNORED
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), supervised) for ids, supervised in runs]


def _rendered(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, bool]]]:
    """Return each of the row's sequences in runs; a class, tags or an answer's mark are appended as supervised."""
    shown = [segments(part, tokenizer) for part in row.tokens.parts]
    if isinstance(row.tokens, TextTokens):
        shown[0].append((f" → {row.tokens.label_name}", True))
    if isinstance(row.tokens, TagTokens):
        shown[0].append((f" → {row.tokens.answer}", True))
    if isinstance(row.tokens, AnswerTokens):
        shown[0].append((f" → {'desirable' if row.tokens.desirable else 'undesirable'}", True))
    return shown


def _summary(rows: list[Row], available: int) -> dict[str, Any]:
    parts = [part for row in rows for part in row.tokens.parts]
    lengths = [len(ids) for ids, _ in parts]
    supervised = [sum(label != IGNORED for label in labels) for _, labels in parts]
    return {
        "rows": len(rows),
        "available": available,
        "groups": len({row.group for row in rows}),
        "slices": len({row.slice for row in rows}),
        "truncated": sum(row.truncated for row in rows),
        "tokens": sum(lengths),
        "length": _quantiles(lengths),
        "supervised_tokens": sum(supervised),
        "supervised_share": round(sum(supervised) / sum(lengths), 4) if any(supervised) else None,
        "supervised_length": _quantiles(supervised),
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    return {name: int(numpy.quantile(values, share, method="nearest")) for name, share in _QUANTILES.items()}
