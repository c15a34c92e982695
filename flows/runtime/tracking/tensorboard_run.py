"""A run as TensorBoard's event files, below `tensorboard/` of the repository: `tensorboard --logdir tensorboard`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.runtime.tracking.flat import flat, numbers
from peftcore.errors import require_extra

SECONDS = 10
"""Seconds until records are on the disk at the latest."""


class TensorBoardRun:
    """One run, in a folder of its own.

    Args:
        config: Configuration to show as text.
        directory: Folder that has the folder `tensorboard`.
        continued: Id of a run whose folder gets the records too; None: a new run.
        name: Name of a new run.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    label = "TensorBoard"

    def __init__(self, config: Mapping[str, Any], directory: Path, continued: str | None, name: str | None) -> None:
        require_extra("tensorboard", "tracking.backends: tensorboard", "tensorboard")
        from torch.utils.tensorboard.writer import SummaryWriter

        self.id = continued or "-".join(filter(None, [name and name.replace("/", "-"), uuid4().hex[:8]]))
        self._writer = SummaryWriter(str(directory / "tensorboard" / self.id), flush_secs=SECONDS)
        if continued is None:
            self.table("parameters", [{"parameter": key, "value": value} for key, value in flat(config).items()])

    def log(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record as points of curves."""
        for name, value in numbers(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Write a picture; pixels: (height, width, 3 or 4), uint8."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as a Markdown table."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [columns, ["---"] * len(columns), *([_cell(row.get(key)) for key in columns] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def summarise(self, summary: Mapping[str, Any], adapter: Path | None) -> None:
        """Write the numbers of the results, and the adapter's folder as text."""
        for name, value in numbers(flat(summary, separator="/")).items():
            self._writer.add_scalar(f"result/{name}", value)
        if adapter is not None:
            self._writer.add_text("adapter", str(adapter.resolve()))

    def close(self, failed: bool) -> None:
        """Write what is left. failed: event files have no place for it, except as a text."""
        if failed:
            self._writer.add_text("status", "failed")
        self._writer.close()


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
