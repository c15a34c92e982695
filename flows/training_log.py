"""Training's own log, which every other view of a run mirrors: one JSON object a line, on the disk once written.

Each record has all FIELDS, null where it says nothing: a training record has `loss` (mean nats per supervised token,
regulariser apart), an evaluation's has `validation_loss`. `seconds` runs on over a resumed run's parts.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from peftcore.files import write_atomically

FIELDS = (
    "step",
    "epoch",
    "loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "regularizer",
    "tokens_per_second",
    "seconds",
)
Record = dict[str, Any]


class TrainingLog:
    """Append-only records of one run in a JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **values: float | None) -> Record:
        """Add a record and wait until it is on the disk; returns it with all FIELDS."""
        unknown = values.keys() - set(FIELDS)
        assert not unknown, f"not fields of the training log: {unknown}"
        record: Record = {name: values.get(name) for name in FIELDS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    def records(self) -> list[Record]:
        """All whole records; a last line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def keep_until(self, step: int) -> list[Record]:
        """Drop what was logged after `step`, because the run goes on from there; returns what is left."""
        kept = [record for record in self.records() if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept


def loss_table(records: list[Record]) -> str:
    """The loss curves as CSV: step, train_loss, validation_loss, learning_rate; one line a step."""
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
