"""The command `peftcore ci`, which jobs of GitHub, GitLab or Jenkins call."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from flows.commands import completion
from flows.commands.common import AsJson, at_stage, errors, project, warn_of_uncommitted, writable
from flows.errors import PipelineError


def ci(
    version: Annotated[
        str | None,
        typer.Option(
            metavar="vX.Y.Z",
            envvar="PEFTCORE_CI_VERSION",
            help="A version, merged or not; default: the versions that the event selects.",
            autocompletion=completion.versions,
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(envvar="PEFTCORE_CI_STAGE", help="The stage to give; default: `gate.stage`.")
    ] = None,
    dry_run: Annotated[
        bool | None,
        typer.Option(
            "--dry-run/--promote",
            envvar="PEFTCORE_CI_DRY_RUN",
            help="Judge only, or promote; default: promote on a version's tag and in a job of the default branch.",
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
            help="The branch or commit whose params.yaml has the rules; default: the target branch of a pull request, "
            "the default branch, or the checkout.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="PEFTCORE_CI_REPORT",
            callback=writable,
            help="The Markdown report; default: `reports/gate.md`.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge or promote the versions of a CI job; writes a report and GitHub's summary and outputs.

    - Push of a tag NAME@vX.Y.Z: the version is promoted if the commit that it was made from is in the default branch.
    - Job of the default branch: merged versions that are newer than the champion and were not judged against it, newest
      first, until one is promoted.
    - Other jobs, such as pull requests: the branch's newest version, or the newest of all, is judged only.
    - `--promote --version` promotes any version.

    The version's files come from DVC's remote, the rules from the protected branch. Exit codes: 3, the gate refuses;
    4, conflict: other jobs were faster at each attempt.
    """
    with errors(), project() as (params, paths):
        from flows.gate.ci import judge, rules_for, tell_error
        from flows.runtime.git import Git

        warn_of_uncommitted(Git(paths.root), "CI judges commits, by the rules of a commit; it works without")
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
            result = {"verdict": verdict.word, "version": verdict.version, "report": str(where), "promotion": promotion}
            result["judged"] = [one.as_dict() for one in verdict.judged]
            print(json.dumps(result, indent=2))
        else:
            print(verdict.promotion.sentence if verdict.promotion else verdict.word)
