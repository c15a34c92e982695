"""The gate as a job of GitHub, GitLab or Jenkins calls it."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from flows.commands import completion
from flows.commands.common import AsJson, at_stage, errors, project
from flows.errors import PipelineError


def ci(
    version: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            envvar="PEFTCORE_CI_VERSION",
            help="Which, merged or not; if left out, those that the event is about.",
            autocompletion=completion.versions,
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(envvar="PEFTCORE_CI_STAGE", help="The stage to give; `gate.stage` if left out.")
    ] = None,
    dry_run: Annotated[
        bool | None,
        typer.Option(
            "--dry-run/--promote",
            envvar="PEFTCORE_CI_DRY_RUN",
            help="Judge only, or promote; if left out, promote on a version's tag and in a job of the default branch.",
        ),
    ] = None,
    remote: Annotated[
        str, typer.Option(envvar="PEFTCORE_CI_REMOTE", help="The git remote that decides between several jobs.")
    ] = "origin",
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            envvar="PEFTCORE_CI_RULES",
            help="The branch or commit whose params.yaml has the rules; if left out, a pull request's base, or the "
            "checkout.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="PEFTCORE_CI_REPORT", help="Markdown; `reports/gate.md` if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge or promote the version that a CI job is about, and tell of it: a report, GitHub's summary and outputs.

    On the push of a tag NAME@vX.Y.Z: that version, promoted if the commit that it was made from is in the default
    branch. In a job of the default branch: each such version that is newer than the champion and was not judged against
    it, the newest first, until one is promoted. Else, as for a pull request: the newest version that the branch
    registered, or the newest of all, judged only. --promote --version promotes any. The version's files come from DVC's
    remote, the rules from the protected branch. Exits with 3 if the gate refuses, with 4 if other jobs promoted first
    each time.
    """
    with errors(), project() as (params, paths):
        from flows.gate.ci import judge, rules_for, tell_error

        where = report or paths.review.with_name("gate.md")
        with ExitStack() as stack:
            try:
                by = stack.enter_context(rules_for(params, paths, os.environ, rules or None, remote))
            except PipelineError as error:
                tell_error(os.environ, where, error, version or None)
                raise
            verdict = judge(at_stage(by, stage), paths, os.environ, where, version, dry_run, remote)
        if as_json:
            promotion = verdict.promotion.as_dict() if verdict.promotion else None
            told = {"verdict": verdict.word, "version": verdict.version, "report": str(where), "promotion": promotion}
            told["judged"] = [one.as_dict() for one in verdict.judged]
            print(json.dumps(told, indent=2))
        else:
            print(verdict.promotion.sentence if verdict.promotion else verdict.word)
