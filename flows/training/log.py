"""The training log, which all views of a run mirror: one JSON object per line, flushed to disk.

Each record has all FIELDS, null if a field does not apply or is not finite. A training record has `loss` (mean nats per
supervised token, without the regulariser); an evaluation's record has `validation_loss`. `seconds` continues over the
parts of a resumed run; `skipped_steps`, `micro_batch_splits` and `rollbacks` count since the record before.

A second file holds the ranks of the adapter's layers: one line at the start, and one after each change.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.files import write_atomically

RANK_HISTORY = "rank_history.jsonl"
FIELDS = (
    "step",
    "epoch",
    "loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "regularizer",
    "divergence",
    "accuracy",
    "reward_margin",
    "reward",
    "reward_deviation",
    "equal_groups",
    "answer_tokens",
    "eos_rate",
    "kl",
    "tokens_per_second",
    "peak_memory",
    "loss_scale",
    "skipped_steps",
    "micro_batch_splits",
    "rollbacks",
    "seconds",
)
"""Fields of a record, in order. divergence: from the teacher (mean nats per token). accuracy: share of correct pairs,
answers or texts. reward_margin: of preferences. peak_memory: maximum bytes so far, of the GPU's allocator, or of the
process without a GPU.

Of grpo, reward, answer_tokens and eos_rate are means over generated answers. reward_deviation is the mean standard
deviation of a group's rewards. equal_groups is the share of groups with equal rewards, from which nothing is learned.
kl: divergence from the base (mean nats per token)."""
Record = dict[str, Any]


class TrainingLog:
    """Append-only records of one run in a JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: float | None) -> Record:
        """Append a record, flush it to disk, and return it with all FIELDS."""
        unknown = values.keys() - set(FIELDS)
        assert not unknown, f"not fields of the training log: {unknown}"
        record: Record = {name: _finite(values.get(name)) for name in FIELDS}
        _append(self.path, record)
        return record

    def records(self) -> list[Record]:
        """Return all complete records; a last line that a crash cut short is left out."""
        return _whole_lines(self.path)

    def keep_until(self, step: int) -> list[Record]:
        """Drop the records after `step`, from which the run resumes; returns the remaining records."""
        _keep_until(self._ranks, step)
        return _keep_until(self.path, step)

    @property
    def _ranks(self) -> Path:
        return self.path.with_name(RANK_HISTORY)

    def append_ranks(self, step: int, ranks: Mapping[str, int]) -> bool:
        """Append the ranks by layer if they differ from the last; returns True if they do."""
        history = self.rank_history()
        if not ranks or (history and history[-1]["ranks"] == ranks):
            return False
        _append(self._ranks, {"step": step, "ranks": dict(ranks)})
        return True

    def rank_history(self) -> list[Record]:
        """Return {"step", "ranks": {path: rank}} of each change; [] for a method without ranks."""
        return _whole_lines(self._ranks)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def _keep_until(path: Path, step: int) -> list[Record]:
    records = [record for record in _whole_lines(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def loss_table(records: list[Record]) -> str:
    """Return the loss curves as CSV: step, train_loss, validation_loss, learning_rate; one line per step."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        row = by_step.setdefault(record["step"], {"step": record["step"]})
        for column, field in (("train_loss", "loss"), ("validation_loss",) * 2, ("learning_rate",) * 2):
            if record[field] is not None:
                row[column] = record[field]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "train_loss", "validation_loss", "learning_rate"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_step[step] for step in sorted(by_step))
    return text.getvalue()
