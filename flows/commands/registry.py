"""Commands of the registry: list, show, diff, card, fetch, gc; and reproduce."""

import json
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands import completion
from flows.commands.common import SIX_HOURS, AsJson, PushTo, StageTimeout, errors, newest, project
from flows.paths import Paths
from flows.runtime.stage import fail

if TYPE_CHECKING:
    from flows.params import Params
    from flows.registry.gc import Collection
    from flows.registry.reader import RegistryReader, RegistrySnapshot, Version
    from flows.registry.reproduction import Reproduction

Chosen = Annotated[
    str | None,
    typer.Argument(
        metavar="[VERSION]",
        help="A version such as v0.1.0, or the name of a stage; default: the newest version.",
        autocompletion=completion.versions_and_holders,
    ),
]
SHOWN = ("base", "adapter", "gain")
"""Parts of the metrics that `show` prints as columns."""


def list_versions(as_json: AsJson = False) -> None:
    """List the registered versions, newest first, with their test loss and stages; collected versions are marked."""
    with errors(), project() as (params, paths):
        registry = _registry(params, paths)
        held, collected = registry.stages().values(), registry.collected()
        rows = [
            {
                "version": version.number,
                "created": _date(version.created),
                "stages": [holder.stage for holder in held if holder.version == version.number],
                "summary": version.message.split("\n", 1)[0].partition(": ")[2],
                "collected": _date(collected[version.number].created) if version.number in collected else None,
            }
            for version in reversed(registry.versions())
        ]
        if as_json:
            print(json.dumps(rows, indent=2))
            return
        table = Table("version", "created", "stage", "summary", title=registry.name, title_justify="left")
        for row in rows:
            note = f" [yellow](files collected {row['collected']})[/]" if row["collected"] else ""
            table.add_row(row["version"], row["created"], ", ".join(row["stages"]), escape(row["summary"]) + note)
        Console(highlight=False).print(table if rows else f"no version of {registry.name} yet; use `peftcore run`")


def show(version: Chosen = None, as_json: AsJson = False) -> None:
    """Show one version: its figures, its lineage and its stages. `--json` prints its whole lineage record."""
    with errors(), project() as (params, paths):
        registry = _registry(params, paths)
        target = _version(registry, version)
        record = registry.record(target)
        if as_json:
            print(json.dumps(record, indent=2))
            return
        console = Console(highlight=False)
        console.print(_figures(record, f"{registry.name} {target.number}"))
        facts = Table(show_header=False, box=None)
        for name, value in _facts(registry, target, record):
            facts.add_row(name, escape(str(value)))
        console.print(facts)


def diff(
    before: Annotated[
        str,
        typer.Argument(
            help="A version such as v0.1.0, or the name of a stage.", autocompletion=completion.versions_and_holders
        ),
    ],
    after: Annotated[
        str | None,
        typer.Argument(
            help="Another version or stage; default: the newest version.",
            autocompletion=completion.versions_and_holders,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: figures, parameters, ranks, data, base, code, software and machine."""
    with errors(), project() as (params, paths):
        from flows.registry.comparison import differences

        registry = _registry(params, paths)
        one, other = (_version(registry, name) for name in (before, after))
        differing = differences(registry.record(one), registry.record(other))
        if as_json:
            rows = [difference._asdict() | {"change": difference.change} for difference in differing]
            print(json.dumps({"before": one.number, "after": other.number, "differences": rows}, indent=2))
            return
        table = Table("", "", one.number, other.number, "change", title=registry.name, title_justify="left")
        for difference in differing:
            shown = ["" if value is None else escape(_short(value)) for value in (difference.before, difference.after)]
            change = "" if difference.change is None else f"{difference.change:+.4g}"
            table.add_row(difference.part, escape(difference.key), *shown, change)
        same = f"the records of {one.number} and {other.number} do not differ"
        Console(highlight=False).print(table if differing else same)


def card(version: Chosen = None) -> None:
    """Print the model card of a version from its commit: Markdown in the Hugging Face hub's format."""
    with errors(), project() as (params, paths):
        from flows.registry.card import CARD, model_card
        from flows.runtime.git import GitError

        registry = _registry(params, paths)
        target = _version(registry, version)
        try:
            print(registry.git.show(target.commit, CARD), end="")
        except GitError:  # versions of old releases have no card
            print(model_card(registry.record(target)), end="")


def fetch(
    remote: Annotated[str, typer.Argument(metavar="[REMOTE]", help="A git remote.")] = "origin",
    as_json: AsJson = False,
) -> None:
    """Fetch a git remote's versions and stages.

    If the remote and this clone gave one number to different versions, this clone's version gets the next free number.
    A stage that was given here and never pushed is replaced by the remote's. Tags of this clone that the remote lacks
    are named.
    """
    with errors(), project() as (params, paths):
        from flows.registry.project_registry import registry_of
        from flows.registry.synchronise import synchronise, unpushed_tags

        registry = registry_of(params, paths.root, sign=True)
        renumbered = synchronise(registry, remote)
        unpushed = unpushed_tags(registry, remote)
        if as_json:
            print(json.dumps({"renumbered": renumbered, "unpushed": unpushed}, indent=2))
            return
        for old, new in renumbered.items():
            print(f"{params.project.name} {old} of this clone is {new} now")
        if not renumbered:
            print(f"the tags of {remote} are here")
        if unpushed:
            command = shlex.join(["git", "push", remote, *unpushed])
            print(f"{remote} lacks {', '.join(unpushed)} of this clone; push them with: {command}")


def gc(
    keep: Annotated[int, typer.Option(min=0, metavar="N", help="Number of newest versions that keep their files.")] = 5,
    remote: Annotated[
        bool, typer.Option("--remote", help="Also remove files from the DVC remote `register.remote`, for good.")
    ] = False,
    forget_past: Annotated[
        bool, typer.Option("--forget-past", help="Also remove versions that had a stage and have none now.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report only; remove nothing.")] = False,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="With --remote: no other repository uses this DVC remote.")
    ] = False,
    as_json: AsJson = False,
    push_to: PushTo = None,
) -> None:
    """Garbage collection: remove files of versions that nothing needs from DVC's cache, and leftovers of killed runs.

    Kept are versions that have or had a stage, the newest versions, and files that branches, other tags, experiments
    and working trees refer to. Tags stay. With `--remote` the removed versions are lost, and `registry list` marks
    them. Versions of other clones are known if their tags are here (`--push-to` fetches them first). A remote with
    objects that this repository has never referred to is refused unless `--exclusive` is given.
    """
    if exclusive and not remote:
        raise typer.BadParameter("it has no effect without --remote; leave it out", param_hint="--exclusive")
    with errors(), project() as (params, paths):
        from flows.registry.gc import collect_garbage

        collection = collect_garbage(params, paths, keep, remote, forget_past, dry_run, push_to, exclusive)
        if as_json:
            print(json.dumps(collection.as_dict(), indent=2))
        else:
            _print_collection(collection)


def reproduce(
    version: Chosen = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Stop after this stage, such as `train`; default: all stages except `register`.",
            autocompletion=completion.stages,
        ),
    ] = None,
    stage_timeout: StageTimeout = SIX_HOURS,
    as_json: AsJson = False,
) -> None:
    """Rebuild a version from its own commit, in a working tree of its own, and compare it byte for byte.

    Fetched inputs are taken from DVC by their hash. Every later stage runs again, with the commit's code and
    parameters. Your files and DVC's cache stay unchanged. Exit code 1: a file of the adapter differs.
    """
    with errors(), project() as (params, paths):
        from flows.registry.reproduction import reproduce as rebuild

        number = _version(_registry(params, paths), version).number
        reproduction = rebuild(params, paths, number, stage_timeout, until)
        if as_json:
            print(json.dumps(reproduction.as_dict(), indent=2))
        else:
            _print_reproduction(reproduction)
        if not reproduction.same:
            fail(reproduction.sentence)


def _registry(params: "Params", paths: Paths) -> "RegistrySnapshot":
    from flows.registry.project_registry import registry_of

    return registry_of(params, paths.root).snapshot()


def _version(registry: "RegistryReader", name: str | None) -> "Version":
    """Return a version by its number or by a stage that it holds; without a name the newest."""
    holder = registry.stages().get(name or "")
    return registry.version((holder.version if holder else name) or newest(registry))


def _figures(record: dict[str, Any], title: str) -> Table:
    metrics = record["metrics"]
    table = Table("", *SHOWN, title=title, title_justify="left")
    for key in dict.fromkeys(key for part in SHOWN for key in metrics.get(part, {})):
        values = (metrics.get(part, {}).get(key) for part in SHOWN)
        table.add_row(escape(key), *("" if value is None else escape(_short(value)) for value in values))
    return table


def _facts(registry: "RegistryReader", version: "Version", record: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    from flows.registry.card import ranks_in_words

    method, changed = record["params"]["method"], record["git"]["uncommitted"]
    stages = ", ".join(one.stage for one in registry.stages().values() if one.version == version.number)
    yield "stages", stages or "none"
    yield "created", record["created"]
    yield "tag, commit", f"{version.tag}, {version.commit[:10]}"
    yield "code", record["git"]["commit"][:10] + (f" and uncommitted: {', '.join(changed)}" if changed else "")
    yield "method", method["name"] + ("" if method["r"] is None else f", r {method['r']}")
    if ranks := record.get("ranks"):
        yield "ranks", ranks_in_words(ranks)
    yield "base", f"{record['params']['base']['source']}, {record['base_model'][:12]}"
    yield "data", f"{record['params']['data']['source']}, {record['dvc'].get('artifacts/data', '')[:12]}"
    yield "test rows", record["evaluation_set"][:12]
    if merge := record["metrics"].get("merge"):
        yield "merge", ", ".join(f"{key} {_short(value)}" for key, value in merge.items())
    yield "adapter", record["adapter"]["content"]
    if mark := registry.collected().get(version.number):
        yield "files", f"collected {_date(mark.created)}: {mark.message.strip()}"


def _print_collection(collection: "Collection") -> None:
    verb = "would be" if collection.dry_run else "are"
    table = Table("", "objects", "MB", title=f"files that {verb} removed", title_justify="left")
    places = {"DVC's cache": collection.cache, "DVC's remote": collection.remote}
    for place, freed in places.items():
        if freed is not None:
            table.add_row(place, str(freed.objects), f"{freed.size / 1e6:.1f}")
    for folder, size in collection.leftovers.items():
        table.add_row(escape(folder), "", f"{size / 1e6:.1f}")
    console = Console(highlight=False)
    console.print(table)
    print(f"versions whose files {verb} removed: {', '.join(collection.collected) or 'none'}")
    print("kept: " + (", ".join(f"{version} ({why})" for version, why in collection.kept.items()) or "none"))
    if collection.lost:
        print(f"kept, but its files are in neither cache nor remote: {', '.join(collection.lost)}")


def _print_reproduction(reproduction: "Reproduction") -> None:
    from flows.registry.reproduction import PARTS

    table = Table("", title=reproduction.version, title_justify="left")
    table.add_column("name", overflow="fold")
    for name in ("registered", "rebuilt", "same", ""):
        table.add_column(name)
    for part in PARTS:
        for one in getattr(reproduction, part):
            values = [escape(_short(value)) for value in (one.registered, one.rebuilt)]
            mark = "[green]✓[/]" if one.same else "[red]✗[/]"
            table.add_row(part, escape(one.name), *values, mark, escape(one.detail))
    Console(highlight=False).print(table)
    if reproduction.same:
        print(reproduction.sentence)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _short(value: object) -> str:
    """Return a value for a table cell: four significant digits, at most 24 characters."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
