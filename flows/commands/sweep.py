"""The command `peftcore sweep`: the pipeline up to the train stage, for every combination of parameters or a search."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows.commands import completion
from flows.commands.common import SIX_HOURS, AsJson, StageTimeout, errors, project, warn_of_other_version
from flows.runtime.project import set_prefect_environment
from flows.runtime.stage import fail


class Runner(StrEnum):
    """Executor of a sweep's trials."""

    THREAD = "thread"
    PROCESS = "process"
    RAY = "ray"


class Method(StrEnum):
    """The two ways in which a sweep chooses parameters: a grid, or a search by Optuna."""

    GRID = "grid"
    OPTUNA = "optuna"


def sweep(
    set_param: Annotated[
        list[str],
        typer.Option(
            "--set-param",
            "-S",
            metavar="KEY=V1,V2",
            help="Values of a parameter, in the syntax of `dvc exp run -S`; with `--search optuna` also "
            "KEY=interval(LOW,HIGH), KEY=int(interval(LOW,HIGH)), KEY=tag(log,interval(LOW,HIGH)) and "
            "KEY=range(LOW,END,STEP).",
            autocompletion=completion.params,
        ),
    ],
    search: Annotated[
        Method,
        typer.Option(help="grid: every combination; optuna: a search with pruning, which the same command continues."),
    ] = Method.GRID,
    trials: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With `--search optuna`: number of trials; default 20.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With `--search optuna`: the seed; default: project.seed.")
    ] = None,
    runner: Annotated[Runner, typer.Option(help="Run trials in threads, processes, or on Ray.")] = Runner.THREAD,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Number of trials at a time.")] = 1,
    limit: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A concurrency limit of Prefect; each trial occupies one slot."),
    ] = None,
    stage_timeout: StageTimeout = SIX_HOURS,
    as_json: AsJson = False,
) -> None:
    """Train every combination of parameters, each in a working tree of its own; rank trials by their validation loss.

    Trials never see the test rows, which the gate uses. Nothing is registered. The number of trials is written into the
    records of later versions on the same data. To use a trial, put its parameters into `params.yaml` and run
    `peftcore run`: its stages come from DVC's cache. Writes `reports/sweep.json` and `reports/sweep.md`. Exit code 1: a
    trial failed.

    `--search optuna` proposes parameters by the earlier trials' losses, and stops a training whose validation loss is
    above the median of the earlier ones. Its study is `reports/sweep.sqlite`. Its trials run one after another.
    """
    if search is Method.GRID and (trials is not None or seed is not None):
        raise typer.BadParameter("a grid has no --trials and no --seed; give --search optuna too")
    if search is Method.OPTUNA and (jobs != 1 or runner is not Runner.THREAD):
        raise typer.BadParameter("a search runs one trial at a time; leave --jobs and --runner out")
    with errors(), project() as (_, paths):
        set_prefect_environment(paths.root)
        warn_of_other_version(paths.root)
        from flows.scaling.ranking import COLUMNS, rows

        if search is Method.OPTUNA:
            from flows.scaling.search import run_search

            results = run_search(paths.root, set_param, trials or 20, seed, stage_timeout, limit)
        else:
            from flows.scaling.sweep import run_sweep

            results = run_sweep(paths.root, set_param, runner.value, jobs, stage_timeout, limit)
        if as_json:
            print((paths.review.parent / "sweep.json").read_text(encoding="utf-8"), end="")
        else:
            table = Table(*(Column(name, overflow="fold") for name in COLUMNS))  # a value is shown whole
            for row in rows(results):
                table.add_row(*map(escape, row))
            Console(highlight=False).print(table)
        failed = [trial for trial in results if trial.error is not None]
        if failed:
            fail(f"{len(failed)} of {len(results)} trials failed; the last: {failed[-1].error}")
