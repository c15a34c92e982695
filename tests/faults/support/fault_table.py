"""The faults that a run must survive, the promise for each, and a table of the trials."""

from collections.abc import Iterable
from dataclasses import dataclass

PROMISES = {
    "kill -9 of training": "resumes from a complete checkpoint, and ends bit-equal to an undisturbed run",
    "kill -9 of dvc, flow or stage": "no orphan process, no half-written output, a rerun is clean",
    "disk full": "non-zero exit, earlier adapter and champion intact; continues once there is space",
    "flipped bit, truncated file, NaN": "refused with the file's name; training falls back to the last good checkpoint",
    "pickle or foreign files": "refused, or reported and never read; the gate refuses; no payload runs",
    "corrupt remote object": "detected on pull, and by the registered SHA-256",
    "concurrent promotions": "exactly one winner, no stale tag",
    "W&B down or dying": "the run finishes with its own complete log",
    "Prefect down": "the run finishes; `dvc repro` needs no Prefect",
    "Ctrl-C": "non-zero exit, the earlier or the new result is complete, a rerun is clean",
    "SIGTERM": "as Ctrl-C; training saves its step first",
    "clock going backwards": "events keep their order, gto agrees",
    "lock left by a crash": "ignored if nobody holds it, otherwise named",
    "read-only repository": "one message, nothing changed",
    "lost DVC cache or remote": "the other one is enough",
}
"""{fault: promise}, in the order of the table."""


@dataclass
class Tally:
    """Trials of one fault. A trial is lost unless its whole promise held."""

    tried: int = 0
    recovered: int = 0

    @property
    def lost(self) -> int:
        return self.tried - self.recovered

    def add(self, tried: int, recovered: int) -> None:
        self.tried += tried
        self.recovered += recovered


def tallied(counts: Iterable[tuple[str, int, int]]) -> dict[str, Tally]:
    """Return {fault: tally} for every fault of the table, from (fault, tried, recovered)."""
    table = {fault: Tally() for fault in PROMISES}
    for fault, tried, recovered in counts:
        table[fault].add(tried, recovered)
    return table


def as_markdown(table: dict[str, Tally]) -> str:
    """Return a Markdown table with a row for each fault, untried faults included."""
    lines = ["| fault | promise | tried | lost | recovered |", "|---|---|---|---|---|"]
    lines += [
        f"| {fault} | {PROMISES[fault]} | {tally.tried} | {tally.lost} | {tally.recovered} |"
        for fault, tally in table.items()
    ]
    return "\n".join(lines) + "\n"
