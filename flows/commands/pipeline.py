"""Commands of the pipeline: run, stage, status, plan, doctor."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.commands import completion
from flows.commands.common import (
    SIX_HOURS,
    AsJson,
    PushTo,
    StageTimeout,
    errors,
    one_document,
    project,
    warn_of_other_version,
    writable,
)
from flows.errors import StageError
from flows.runtime.project import changed_stages, set_prefect_environment, stage_order, stage_states
from flows.runtime.stage import fail
from flows.runtime.stage_code import refresh


def run(
    stage_timeout: StageTimeout = SIX_HOURS,
    push_to: PushTo = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline: the stages whose parameters, code or inputs changed, then the gate and the review page.

    The stages are in `dvc.yaml`, their parameters in `params.yaml`. Prefect runs the stages, with a server that ends
    with the run; `dvc repro` runs the same stages without Prefect. After an interruption, training continues from its
    last checkpoint. Exit codes: 1, a stage failed; 3, the gate refuses.
    """
    with errors(), project() as (_, paths):
        set_prefect_environment(paths.root)
        warn_of_other_version(paths.root)
        refresh(paths.root)
        with ThreadPoolExecutor(1) as pool:
            changing = pool.submit(changed_stages, paths.root)  # a process, which imports while this one does
            from flows.pipeline.run import run_pipeline
            from flows.runtime.last_run import last_run

            before = last_run(paths)
            try:
                with one_document(as_json):
                    run_pipeline(paths.root, stage_timeout, push_to, changing.result)
            finally:
                record = last_run(paths)
                if as_json and record != before:
                    print(json.dumps(record, indent=2))


def stage(
    name: Annotated[
        str, typer.Argument(help="A stage of dvc.yaml, such as `train`.", autocompletion=completion.stages)
    ],
    force: Annotated[bool, typer.Option("--force", help="Run it even if nothing changed.")] = False,
    stage_timeout: StageTimeout = SIX_HOURS,
    as_json: AsJson = False,
) -> None:
    """Run one stage on the outputs of the stages before it, if its parameters, code or inputs changed."""
    from flows.runtime.stage_process import run_stage

    with errors(), project() as (_, paths):
        stages = stage_order(paths.root)
        if name not in stages:
            raise StageError(f"there is no stage {name!r} in dvc.yaml; there is: {', '.join(stages)}")
        warn_of_other_version(paths.root)
        began = time.monotonic()
        run_stage(paths.root, name, stage_timeout, force)
        if as_json:
            print(json.dumps({"stage": name, "seconds": time.monotonic() - began}))


def status(
    states: Annotated[
        bool, typer.Option("--stages/--no-stages", help="Show what changed for each stage; DVC takes a second or more.")
    ] = True,
    every: Annotated[
        bool, typer.Option("--all", help="Show one line for each project of the git repository, without stages.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(callback=writable, metavar="FILE", help="With --all: also write the table as HTML.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show running processes, the last run, the state of each stage, and the version of each registry stage.

    Also shows the newest version and its verdict, the last and the next retraining, disk use, and leftovers of killed
    processes.
    """
    if page is not None and not every:
        raise typer.BadParameter("it needs --all; one project has reports/review.html", param_hint="--page")
    if every:
        _status_of_all(page, as_json)
        return
    with errors(), project() as (params, paths):
        from flows.commands.status import print_status
        from flows.pipeline.status import next_step
        from flows.pipeline.status import status as read_status
        from flows.project.outdated import differences

        facts = read_status(params, paths)
        facts["hints"] += differences(paths.root)
        if states and not os.access(paths.root / ".dvc", os.W_OK):
            states = False
            facts["hints"].append("the states of the stages are left out, because DVC cannot write its lock in .dvc")
        result = ({"stages": stage_states(paths.root)} if states else {}) | facts
        result["next_step"] = next_step(result)
        if as_json:
            print(json.dumps(result, indent=2))
        else:
            print_status(result)


def _status_of_all(page: Path | None, as_json: bool) -> None:
    """Show the projects of the git repository around the current folder."""
    with errors():
        from flows.commands.status import print_statuses
        from flows.pipeline.projects import statuses, write_projects_page
        from flows.runtime.project import project_roots

        rows = statuses(project_roots())
        if page is not None:
            write_projects_page(rows, page)
        if as_json:
            print(json.dumps([row.as_dict() for row in rows], indent=2))
        else:
            print_statuses(rows)


def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="A model's config.json; the weights are not needed."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Train two shallow models of the real width for a few steps.")
    ] = True,
    probe_timeout: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Time limit for the probe; default: 600.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, time and disk space of a training, and suggest changes that make it fit.

    Weights and activations are computed from `params.yaml`, the base's configuration and the prepared rows, without
    allocating them; without prepared rows, rows of full length are assumed. The probe measures the time and the rest of
    the memory. Exit code 1: the run does not fit this machine.
    """
    if probe_timeout is not None and not probe:
        raise typer.BadParameter("with --no-probe there is no probe to limit", param_hint="--probe-timeout")
    with errors(), project() as (params, paths):
        from flows.resources.probe_launch import Probe

        # before the imports below, so that both processes import at once
        with one_document(as_json), Probe() if probe else nullcontext() as process:
            from flows.resources.estimate import estimate
            from flows.resources.table import print_estimate

            planned = estimate(params, paths, config, process, probe_timeout or 600.0)
        if as_json:
            print(json.dumps(planned.as_dict(), indent=2))
        else:
            print_estimate(planned)
        if not planned.fits:
            fail(planned.refusal())


def doctor(
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Number of training rows to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Validate the prepared data: supervised tokens, end-of-sequence tokens, leakage between splits, and more.

    Shows rows with the prompt dim and the supervised part green (a rejected answer red), then each check with its
    figure and its fix. The train stage refuses data with an error. Exit code 1: a check found an error.
    """
    with errors(), project() as (params, paths):
        with one_document(as_json):  # the imports print too
            from flows.base.folder import load_tokenizer
            from flows.data.rows import read_rows
            from flows.evaluation.reward_check import reward_findings
            from flows.params import left_over
            from flows.validation.examination import examine
            from flows.validation.preview import findings_table, preview

            findings, demonstration = examine(paths, params), left_over(params)
            if params.train.objective == "grpo":
                rewarded = read_rows(paths.split("train"))
                findings = findings.plus(reward_findings(params.train.grpo.rewards, rewarded, paths.root))
        if as_json:
            result = findings.as_dict() | {"demonstration": demonstration}
            print(json.dumps(result, indent=2, ensure_ascii=False))
        else:
            console = Console(highlight=False)
            for shown in preview(paths.split("train"), load_tokenizer(paths.base), params.data.kind, rows):
                console.print(shown)
            console.print(findings_table(findings))
            for warning in demonstration:
                console.print(f"warning: {warning}", markup=False, soft_wrap=True)
        wrong = findings.of("error")
        if wrong:
            named = ", ".join(finding.check for finding in wrong)
            fail(f"{len(wrong)} of {len(findings.findings)} checks found an error: {named}")
