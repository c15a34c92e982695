"""The pipeline: run it or one stage of it, plan it, look at its rows, tell how it stands."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.commands import completion
from flows.commands.common import SIX_HOURS, AsJson, PushTo, StageTimeout, errors, one_document, project
from flows.errors import StageError
from flows.runtime.project import set_prefect_environment, stage_order, stage_states
from flows.runtime.stage import fail


def run(
    stage_timeout: StageTimeout = SIX_HOURS,
    push_to: PushTo = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline: only stages whose parameters, code or inputs changed; then the gate and the page.

    The stages are those of `dvc.yaml`, their parameters those of `params.yaml`. Prefect drives them with a server
    of its own that ends with the run; `dvc repro` runs the same stages without it. Interrupt it when you like:
    training goes on from its last checkpoint. Exits with 1 if a stage fails, with 3 if the
    gate refuses.
    """
    with errors(), project() as (_, paths):
        set_prefect_environment(paths.root)
        from flows.pipeline import run_pipeline
        from flows.runtime.last_run import last_run

        before = last_run(paths)
        try:
            with one_document(as_json):
                run_pipeline(paths.root, stage_timeout, push_to)
        finally:
            told = last_run(paths)
            if as_json and told != before:
                print(json.dumps(told, indent=2))


def stage(
    name: Annotated[
        str, typer.Argument(help="A stage of dvc.yaml, such as `train`.", autocompletion=completion.stages)
    ],
    force: Annotated[bool, typer.Option("--force", help="Run it even if nothing changed.")] = False,
    stage_timeout: StageTimeout = SIX_HOURS,
    as_json: AsJson = False,
) -> None:
    """Run one stage on what the stages before it have left, if its parameters, code or inputs changed."""
    from flows.runtime.stage_process import run_stage

    with errors(), project() as (_, paths):
        stages = stage_order(paths.root)
        if name not in stages:
            raise StageError(f"there is no stage {name!r} in dvc.yaml; there is: {', '.join(stages)}")
        began = time.monotonic()
        run_stage(paths.root, name, stage_timeout, force)
        if as_json:
            print(json.dumps({"stage": name, "seconds": time.monotonic() - began}))


def status(
    states: Annotated[
        bool, typer.Option("--stages/--no-stages", help="Of each stage, what changed: DVC takes a second or more.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """What runs now, how the last run ended, which stages are up to date, and which version has which stage.

    Also the newest version and its verdict, the last retraining and the next one, the disk, and what killed processes
    left behind.
    """
    with errors(), project() as (params, paths):
        from flows.commands.status import print_status
        from flows.status import status as look

        found = ({"stages": stage_states(paths.root)} if states else {}) | look(params, paths)
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            print_status(found)


def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="A model's config.json; the model need not be here."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Train two shallow models of the real widths for a few steps.")
    ] = True,
    probe_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Stop a process of the probe that takes longer.")
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """How much memory, time and disk training will take, and what would make it fit, before anything is trained.

    Weights are counted and activations simulated without making any, from `params.yaml`, the base's configuration and
    the prepared rows (full ones where none are prepared); the probe measures the rest and the time. Exits with 1 if
    the run will not fit this machine.
    """
    with errors(), project() as (params, paths):
        from flows.resources.estimate import estimate
        from flows.resources.table import print_estimate

        planned = estimate(params, paths, config, probe, probe_timeout)
        if as_json:
            print(json.dumps(planned.as_dict(), indent=2))
        else:
            print_estimate(planned)
        if not planned.fits:
            fail(planned.refusal())


def doctor(
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Training rows to show, with what is learned.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Look at the rows that the prepare stage left: what is learned, whether it ends, what leaks between splits.

    Shows rows with their prompt dim and the learned part green (a rejected answer red), then each check with its figure
    and, where something is wrong, what to do. The train stage refuses rows with an error. Exits with 1 if there is one.
    """
    with errors(), project() as (params, paths):
        from flows.params import left_over
        from flows.validation.examination import examine, load_tokenizer
        from flows.validation.preview import findings_table, preview

        findings, demonstration = examine(paths, params), left_over(params)
        if as_json:
            told = findings.as_dict() | {"demonstration": demonstration}
            print(json.dumps(told, indent=2, ensure_ascii=False))
        else:
            console = Console(highlight=False)
            for shown in preview(paths.split("train"), load_tokenizer(paths), params.data.kind, rows):
                console.print(shown)
            console.print(findings_table(findings))
            for told in demonstration:
                console.print(f"warning: {told}", markup=False, soft_wrap=True)
        wrong = findings.of("error")
        if wrong:
            named = ", ".join(finding.check for finding in wrong)
            fail(f"{len(wrong)} of {len(findings.findings)} checks found an error: {named}")
