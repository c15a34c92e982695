"""The gate, and what comes of it: promote and roll back."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands.common import AsJson, PushTo, errors, project
from flows.errors import GateError
from flows.promotion.gate import Check
from flows.stage import fail
from peftcore.files import write_atomically


def promote(
    version: Annotated[
        str | None, typer.Option(metavar="vX.Y.Z", help="Which version; that of the last run if left out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge only; change nothing.")] = False,
    as_json: AsJson = False,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the verdict and its checks there too, for a pull request."),
    ] = None,
    push_to: PushTo = None,
) -> None:
    """Judge a version by the gate and, if it passes, give it the stage `gate.stage` of `params.yaml`.

    The gate's checks, in order: only allowed files; their registered SHA-256; finite weights; the thresholds of
    `params.yaml`; better than the version that has the stage now (a paired bootstrap on the same test rows), and in no
    slice of them worse than allowed; the adapter's size; a faithful merge. The first that fails is the reason. Exits
    with 3 if it refuses, with 4 if somebody else promoted meanwhile.
    """
    with errors(), project() as (params, paths):
        from flows.promotion.promote import promote as promote_version
        from flows.promotion.report import as_markdown

        promotion = promote_version(params, paths, version, dry_run, push_to)
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
        str | None, typer.Option(metavar="vX.Y.Z", help="Which earlier one; the last before this if left out.")
    ] = None,
    as_json: AsJson = False,
    push_to: PushTo = None,
) -> None:
    """Give the stage `gate.stage` back to a version that had it before, at once and without the gate.

    Its files have to be those that were registered. The tag says when, by whom and why, in place of which version, and
    what the gate had said. Exits with 1 if there is none, with 4 if
    somebody else promoted meanwhile.
    """
    with errors(), project() as (params, paths):
        from flows.promotion.promote import roll_back

        promotion = roll_back(params, paths, reason, to, push_to)
        print(json.dumps(promotion.as_dict(), indent=2) if as_json else promotion.sentence)


def _print_checks(checks: Iterable[Check]) -> None:
    table = Table("check", "", "found")
    for check in checks:
        table.add_row(check.name, "[green]✓[/]" if check.passed else "[red]✗[/]", escape(check.detail))
    if table.row_count:
        Console(highlight=False).print(table)
