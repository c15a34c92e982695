"""The registry: versions and stages, one version's record, what differs between two."""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands.common import AsJson, errors, holders, newest, project


def list_versions(as_json: AsJson = False) -> None:
    """All registered versions, the newest first, with their test loss and stages."""
    from flows.git import Git
    from flows.promotion.registry import Registry

    with errors(), project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        holders = registry.stages().values()
        rows = []
        for version in reversed(registry.versions()):
            stages = [holder.stage for holder in holders if holder.version == version.number]
            created = datetime.fromtimestamp(version.created, UTC).isoformat(timespec="seconds")
            title = version.message.split("\n", 1)[0].partition(": ")[2]
            rows.append({"version": version.number, "created": created, "stages": stages, "summary": title})
        if as_json:
            print(json.dumps(rows, indent=2))
            return
        table = Table("version", "created", "stage", "summary", title=registry.name, title_justify="left")
        for row in rows:
            table.add_row(row["version"], row["created"], ", ".join(row["stages"]), escape(row["summary"]))
        Console(highlight=False).print(table if rows else f"no version of {registry.name} yet; use `peftcore run`")


def show(
    version: Annotated[str | None, typer.Argument(help="Its number, as v0.1.0; the newest if left out.")] = None,
) -> None:
    """The lineage record of one version, as JSON: code, data, parameters, metrics, hashes of every file."""
    from flows.git import Git
    from flows.promotion.registry import Registry

    with errors(), project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        print(json.dumps(registry.record(registry.version(version or newest(registry))), indent=2))


def diff(
    before: Annotated[str, typer.Argument(help="A version, as v0.1.0, or the name of a stage.")],
    after: Annotated[str | None, typer.Argument(help="Another; the newest if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """What differs between two versions: figures, parameters, data, base, code and software."""
    from flows.git import Git
    from flows.promotion.comparison import differences
    from flows.promotion.registry import Registry

    with errors(), project() as (params, paths):
        registry = Registry(Git(paths.root), params.project.name)
        holding = holders(params, paths)
        one, other = (registry.version(holding.get(name) or name) for name in (before, after or newest(registry)))
        found = differences(registry.record(one), registry.record(other))
        if as_json:
            rows = [difference._asdict() | {"change": difference.change} for difference in found]
            print(json.dumps({"before": one.number, "after": other.number, "differences": rows}, indent=2))
            return
        table = Table("", "", one.number, other.number, "change", title=registry.name, title_justify="left")
        for difference in found:
            shown = ["" if value is None else escape(_short(value)) for value in (difference.before, difference.after)]
            change = "" if difference.change is None else f"{difference.change:+.4g}"
            table.add_row(difference.part, escape(difference.key), *shown, change)
        same = f"{one.number} and {other.number} differ in nothing that was recorded"
        Console(highlight=False).print(table if found else same)


def _short(value: object) -> str:
    """A value for one cell: a float to four digits that count, a digest by its first ones."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
