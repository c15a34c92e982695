"""report.json: what went into the splits, what was dropped and why, and rows as the model sees them."""

from collections import Counter
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from flows.data.chat import IGNORED, Tokens
from flows.data.splits import Row, leakage
from flows.paths import Split

RENDERED = 5
"""How many rows are shown with their supervised part."""
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def data_report(
    source: str,
    examples: int,
    available: dict[Split, int],
    splits: dict[Split, list[Row]],
    dropped: Counter[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """The report as JSON holds it.

    examples: read from the source. available: rows of each split before sampling. Lengths are in tokens.
    """
    shown = splits["train"][:RENDERED]
    return {
        "source": source,
        "examples": examples,
        "dropped": dict(sorted(dropped.items())),
        "splits": {split: _summary(rows, available[split]) for split, rows in splits.items()},
        "leakage": leakage(splits),
        "rendered": [{"id": row.tokens.id, "segments": segments(row.tokens, tokenizer)} for row in shown],
    }


def segments(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row's text in runs of (text, whether it is supervised)."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        supervised = label != IGNORED
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), supervised) for ids, supervised in runs]


def _summary(rows: list[Row], available: int) -> dict[str, Any]:
    lengths = [len(row.tokens.input_ids) for row in rows]
    supervised = [sum(label != IGNORED for label in row.tokens.labels) for row in rows]
    return {
        "rows": len(rows),
        "available": available,
        "groups": len({row.group for row in rows}),
        "slices": len({row.slice for row in rows}),
        "truncated": sum(row.truncated for row in rows),
        "tokens": sum(lengths),
        "length": _quantiles(lengths),
        "supervised_tokens": sum(supervised),
        "supervised_share": round(sum(supervised) / sum(lengths), 4),
        "supervised_length": _quantiles(supervised),
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    return {name: int(numpy.quantile(values, share, method="nearest")) for name, share in _QUANTILES.items()}
