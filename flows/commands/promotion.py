"""Commands of the gate: promote, rollback, approve."""

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
from flows.commands.common import AsJson, PushTo, at_stage, errors, newest, project, warn_of_uncommitted, writable
from flows.errors import GateError
from flows.runtime.stage import fail
from peftcore.files import write_atomically

if TYPE_CHECKING:
    from flows.gate.gate import Check

Stage = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="The stage; default: `gate.stage` of `params.yaml`.")
]


def promote(
    version: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            help="The version; default: the version of the last run.",
            autocompletion=completion.versions,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge only; change nothing.")] = False,
    as_json: AsJson = False,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=writable, help="Also write the verdict and its checks as Markdown."),
    ] = None,
    push_to: PushTo = None,
    stage: Stage = None,
    again: Annotated[
        bool, typer.Option("--again", help="Judge the version even if it was rolled back or its stage was withdrawn.")
    ] = False,
) -> None:
    """Judge a version by the gate and, if it passes, give it the stage.

    The gate's checks, in order:

    - the adapter did not lose the stage before; only allowed files, with their registered SHA-256
    - the registered evaluation, whose figures follow from its rows, made with the settings of `params.yaml`
    - an allowed signature; finite weights; the thresholds of `params.yaml`
    - better than the champion on the same test rows (paired bootstrap, with a re-evaluation if the rows differ), not
      worse than allowed on the champion's own test rows, in no slice worse than allowed
    - no forgetting on the control set; the adapter's size and latency; merge fidelity; enough approvals

    Every failed check is reported. Exit codes: 3, the gate refuses; 4, conflict: another writer was faster.
    """
    with errors(), project() as (params, paths):
        from flows.gate.promote import promote as promote_version
        from flows.gate.report import as_markdown
        from flows.runtime.git import Git

        rules = [paths.params.name]
        warn_of_uncommitted(
            Git(paths.root), "the version is judged by uncommitted rules, and CI by the committed", rules
        )
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
    reason: Annotated[str, typer.Option(help="The reason, which the tag keeps.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            help="An earlier holder of the stage; default: the last one that was not rolled back.",
            autocompletion=completion.versions,
        ),
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
    stage: Stage = None,
) -> None:
    """Give the stage back to a version that had it before, without the gate.

    The version's files have to be the registered ones. The tag keeps the author, the reason, the replaced version and
    the gate's earlier report. Exit codes: 1, no such version; 4, conflict: another writer was faster.
    """
    with errors(), project() as (params, paths):
        from flows.gate.promote import roll_back

        promotion = roll_back(at_stage(params, stage), paths, reason, to, push_to)
        print(json.dumps(promotion.as_dict(), indent=2) if as_json else promotion.sentence)


def approve(
    note: Annotated[str, typer.Option(help="What you reviewed and why you approve; the tag keeps the note.")],
    version: Annotated[
        str | None,
        typer.Argument(
            metavar="[vX.Y.Z]", help="The version; default: the newest.", autocompletion=completion.versions
        ),
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
) -> None:
    """Approve a version by a tag with your name and a note; `gate.approvals` may require approvals for a promotion.

    The person who registered a version cannot approve it. If `gate.allowed_signers` lists ssh keys, the approval has to
    be signed with one of these keys (`PEFTCORE_SIGNING_KEY`). Without that list an approval proves nothing. Exit
    code 4: you have approved the version already.
    """
    with errors(), project() as (params, paths):
        from flows.registry.approvals import approve as approve_version
        from flows.registry.project_registry import registry_of
        from flows.registry.signatures import allowed_signers

        registry = registry_of(params, paths.root, sign=True)
        target = registry.version(version or newest(registry))
        approval = approve_version(registry, target, note, allowed_signers(params.gate, paths.root), push_to)
        if as_json:
            print(json.dumps({"name": registry.name, "version": target.number, **asdict(approval)}, indent=2))
        else:
            print(f"{registry.name} {target.number} is approved by {approval.who}: {approval.tag}")
            if params.gate.allowed_signers is None:
                print("it proves nothing: anybody can set this e-mail; gate.allowed_signers requires signatures")


def _print_checks(checks: Iterable["Check"]) -> None:
    table = Table("check", "", "measured, and the limit")
    for check in checks:
        table.add_row(check.name, "[green]✓[/]" if check.passed else "[red]✗[/]", escape(check.detail))
    if table.row_count:
        Console(highlight=False).print(table)
