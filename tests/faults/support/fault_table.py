"""The faults that a run must survive, what is promised for each, and a table of how often it was put to the test."""

from collections.abc import Iterable
from dataclasses import dataclass

PROMISES = {
    "kill -9 of training": "resumes from a whole checkpoint, ends bit-equal to a run that nothing befell",
    "kill -9 of dvc, flow or stage": "no orphan, no half-written out, a rerun is clean",
    "disk full": "non-zero exit, the adapter and champion of before intact; goes on once there is room",
    "flipped bit, truncated file, NaN": "refused with the file's name; training falls back to the last good checkpoint",
    "pickle or foreign files": "refused, or warned of and never read; the gate refuses; no payload runs",
    "corrupt remote object": "detected on pull, and by the registered SHA-256",
    "concurrent promotions": "exactly one winner, no stale tag",
    "W&B down or dying": "the run finishes, its own log whole",
    "Prefect down": "the run finishes; `dvc repro` needs no Prefect",
    "Ctrl-C": "non-zero exit, what was there before or the new whole, a rerun is clean",
    "SIGTERM": "as Ctrl-C; training saves its step first",
    "clock going backwards": "events keep their order, gto agrees",
    "lock left by a crash": "ignored where nobody holds it, else named",
    "read-only repository": "one message, nothing changed",
    "lost DVC cache or remote": "the other one is enough",
}
"""{fault: promise}, in the order of the table."""


@dataclass
class Tally:
    """How often a fault was tried, and what came of it. A trial counts as lost unless all of its promise held."""

    tried: int = 0
    recovered: int = 0

    @property
    def lost(self) -> int:
        return self.tried - self.recovered

    def add(self, tried: int, recovered: int) -> None:
        self.tried += tried
        self.recovered += recovered


def tallied(counts: Iterable[tuple[str, int, int]]) -> dict[str, Tally]:
    """{fault: tally} of (fault, tried, recovered), for every fault of the table."""
    table = {fault: Tally() for fault in PROMISES}
    for fault, tried, recovered in counts:
        table[fault].add(tried, recovered)
    return table


def as_markdown(table: dict[str, Tally]) -> str:
    """A row for each fault, those that nothing tried too."""
    lines = ["| fault | promise | tried | lost | recovered |", "|---|---|---|---|---|"]
    lines += [
        f"| {fault} | {PROMISES[fault]} | {tally.tried} | {tally.lost} | {tally.recovered} |"
        for fault, tally in table.items()
    ]
    return "\n".join(lines) + "\n"
