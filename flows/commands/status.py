"""The tables of `peftcore status`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.pipeline.projects import ProjectStatus

SHOWN = 4
"""Changes of a stage that are listed."""


def print_status(status: Mapping[str, Any]) -> None:
    """Print the result of `flows.pipeline.status.status`, and the pipeline's stages if it has the key `stages`."""
    console = Console(highlight=False)
    if (stages := status.get("stages")) is not None:
        table = Table("stage", "state")
        for name, changes in stages.items():
            more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            words = ", ".join(changes[:SHOWN]) + more
            table.add_row(name, f"[yellow]{escape(words)}[/]" if changes else "[green]up to date[/]")
        console.print(table)
    facts = Table.grid(padding=(0, 2))
    for label, text in _facts(status):
        facts.add_row(f"[dim]{label}[/]", escape(text))
    console.print(facts)
    console.print(f"next: {escape(status['next_step'])}")
    for hint in status["hints"]:
        console.print(f"[yellow]{escape(hint)}[/]")


def print_statuses(rows: "Sequence[ProjectStatus]") -> None:
    """Print one line for each project of a repository."""
    from flows.pipeline.projects import COLUMNS

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.cells()))
    Console(highlight=False).print(table)


def _facts(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "registry", _registry(status["name"], status["registry"])
    yield "running", "; ".join(_process(one) for one in status["running"]) or "nothing"
    run = status["last_run"]
    yield "last run", _run(run) if run else "none"
    if (champion := status["champion"]) and champion["version"]:
        loss = "unknown" if champion["test_loss"] is None else f"{champion['test_loss']:.3f} nats"
        yield champion["stage"], f"{champion['version']} since {champion['since']}, test loss {loss}"
    if candidate := status["candidate"]:
        reason = f": {candidate['reason']}" if candidate["reason"] else ""
        yield "newest", f"{candidate['version']}, {candidate['verdict']}{reason}"
    if looks := status["looks"]:
        yield "looks", looks["in_words"]
    if last := status["retraining"]["last"]:
        yield "retraining", f"{last['outcome']} {last['finished']}: {last['reason']}"
    if schedule := status["retraining"]["schedule"]:
        yield "next", f"{schedule['next']} ({schedule['cron']}, {schedule['timezone']})"
    if status["uncommitted"]:
        yield "uncommitted", f"{status['uncommitted']}; a retraining and CI work without"
    disk = status["disk"]
    sizes = {"free": disk["free"], "cache": disk["cache"], "checkpoints": disk["checkpoints"]}
    trees = {f"working tree {tree}": size for tree, size in disk["worktrees"].items()}
    yield "disk", ", ".join(f"{_bytes(size)} {name}" for name, size in (sizes | trees).items())


def _registry(name: str, holders: Mapping[str, str | None]) -> str:
    if not holders:
        return f"{name}: nothing is promoted yet"
    return f"{name}: " + ", ".join(
        f"{stage} is {version or 'a commit without a version'}" for stage, version in holders.items()
    )


def _process(one: Mapping[str, Any]) -> str:
    return " ".join(str(part) for part in (one["what"], one["task"], f"(process {one['pid']})") if part)


def _run(run: Mapping[str, Any]) -> str:
    took = " · ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds"].items())
    where = f" at {run['failed_task']}" if run["failed_task"] else ""
    return f"{run['outcome']}{where}, {run['finished']}; seconds {took}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
