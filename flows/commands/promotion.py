"""The gate, and what comes of it: promote and roll back; and people's approvals, which it can ask for."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands import completion
from flows.commands.common import AsJson, PushTo, at_stage, errors, newest, project
from flows.errors import GateError
from flows.runtime.stage import fail
from peftcore.files import write_atomically

if TYPE_CHECKING:
    from flows.gate.gate import Check

Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="`gate.stage` of `params.yaml` if left out.")
]


def promote(
    version: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            help="Which version; that of the last run if left out.",
            autocompletion=completion.versions,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge only; change nothing.")] = False,
    as_json: AsJson = False,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the verdict and its checks there too, for a pull request."),
    ] = None,
    push_to: PushTo = None,
    stage: Stage = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also a version that was rolled back, or whose stage was taken back.")
    ] = False,
) -> None:
    """Judge a version by the gate and, if it passes, give it the stage.

    The gate's checks, in order: the stage was not taken back from it; only allowed files; their registered SHA-256; the
    registered evaluation, with figures that follow from its rows; measured as `params.yaml` asks; an allowed signature;
    finite weights; the thresholds of `params.yaml`; better than the version that has the stage now (a paired bootstrap
    on the same test rows, on which that one is measured again if they are new to it), not worse than allowed on that
    one's own test rows, and in no slice worse than allowed; nothing forgotten on the control set; the adapter's size
    and latency; a faithful merge; enough approvals. Every one that fails is named. Exits with 3 if it refuses,
    with 4 if somebody else promoted meanwhile.
    """
    with errors(), project() as (params, paths):
        from flows.gate.promote import promote as promote_version
        from flows.gate.report import as_markdown

        promotion = promote_version(at_stage(params, stage), paths, version, dry_run, push_to, again)
        if markdown is not None:
            write_atomically(markdown, as_markdown(promotion))
        if as_json:
            print(json.dumps(promotion.as_dict(), indent=2))
        else:
            _print_checks(promotion.report.checks if promotion.report else ())
            if promotion.accepted:
                print(promotion.sentence)
        if not promotion.accepted:
            fail(promotion.sentence, GateError.status)


def rollback(
    reason: Annotated[str, typer.Option(help="Why; the tag keeps it.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            help="Which earlier one; the last before this if left out.",
            autocompletion=completion.versions,
        ),
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
    stage: Stage = None,
) -> None:
    """Give the stage back to a version that had it before, at once and without the gate.

    Its files have to be those that were registered. The tag says when, by whom and why, in place of which version, and
    what the gate had said. Exits with 1 if there is none, with 4 if somebody else promoted meanwhile.
    """
    with errors(), project() as (params, paths):
        from flows.gate.promote import roll_back

        promotion = roll_back(at_stage(params, stage), paths, reason, to, push_to)
        print(json.dumps(promotion.as_dict(), indent=2) if as_json else promotion.sentence)


def approve(
    note: Annotated[str, typer.Option(help="What was looked at, and why it is good; the tag keeps it.")],
    version: Annotated[
        str | None,
        typer.Argument(metavar="[vX.Y.Z]", help="The newest if left out.", autocompletion=completion.versions),
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
) -> None:
    """Approve a version, which promoting it may need (`gate.approvals`), by a tag that says who, when and why.

    Whoever registered a version cannot approve it. Where `gate.allowed_signers` lists ssh keys, the approval has to be
    signed with one of them (`PEFTCORE_SIGNING_KEY`); without that list it proves nothing. Exits with 4 if you have
    approved it already.
    """
    with errors(), project() as (params, paths):
        from flows.registry.approvals import approve as approve_version
        from flows.registry.project_registry import registry_of
        from flows.registry.signatures import allowed_signers

        registry = registry_of(params, paths.root, sign=True)
        chosen = registry.version(version or newest(registry))
        made = approve_version(registry, chosen, note, allowed_signers(params.gate, paths.root), push_to)
        if as_json:
            print(json.dumps({"name": registry.name, "version": chosen.number, **asdict(made)}, indent=2))
        else:
            print(f"{registry.name} {chosen.number} is approved by {made.who}: {made.tag}")
            if params.gate.allowed_signers is None:
                print("it proves nothing: anybody can set this e-mail; gate.allowed_signers asks for signatures")


def _print_checks(checks: Iterable["Check"]) -> None:
    table = Table("check", "", "found")
    for check in checks:
        table.add_row(check.name, "[green]✓[/]" if check.passed else "[red]✗[/]", escape(check.detail))
    if table.row_count:
        Console(highlight=False).print(table)
