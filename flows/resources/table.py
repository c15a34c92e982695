"""An estimate as tables for a terminal."""

from rich.console import Console
from rich.table import Table

from flows.resources.estimate import Estimate, as_yaml, gib


def print_estimate(plan: Estimate) -> None:
    """Print memory, time, disk, and alternatives."""
    console = Console(highlight=False)
    rows, width = plan.batch
    console.print(
        f"{plan.model}, {plan.blocks} blocks, {plan.trainable / 1e6:,.2f} M trained weights, {plan.optimizer_steps} "
        f"optimiser steps, at most {rows} × {width} tokens a forward pass"
    )
    memory = _table("peak memory of training", "")
    for name, size in plan.memory.items():
        memory.add_row(name, gib(size))
    memory.add_section()
    memory.add_row("peak" if plan.peak > plan.loading_peak else "peak, while loading the base", gib(plan.peak))
    if plan.mapped:
        memory.add_row("of which mapped, can be dropped by the system", gib(plan.mapped))
    memory.add_row(f"{plan.owner} has", f"{gib(plan.limit)}, {gib(plan.free)} free now")
    console.print(memory)
    if plan.time:
        time = _table(f"time: {duration(plan.seconds)}, {plan.seconds_per_step:.2f} s an optimiser step", "")
        for name, seconds in plan.time.items():
            time.add_row(name, duration(seconds))
        console.print(time)
    disk = _table(f"disk: {gib(sum(plan.disk.values()))}, {gib(plan.disk_free)} free", "")
    for name, size in plan.disk.items():
        if size:
            disk.add_row(name, gib(size))
    console.print(disk)
    if plan.changes:
        changes = _table("alternatives in params.yaml", "peak")
        for change in plan.changes:
            changes.add_row(as_yaml(change.params), gib(change.peak) + ("" if change.fits else ", does not fit"))
        console.print(changes)
    for note in plan.notes:
        console.print(note)


def duration(seconds: float) -> str:
    """Return seconds in a readable unit."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(title: str, heading: str) -> Table:
    table = Table(title, title_justify="left")
    table.add_column(heading, justify="right")
    return table
