"""Commands of review: review and trial."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.commands.common import AsJson, errors, one_document, project, warn_of_other_version, writable


def review(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...",
            help="A W&B folder (`wandb`, `wandb/offline-run-...`), `wandb:ENTITY/PROJECT[/RUN_ID]` of a server, "
            "a version (`v0.1.0`) or stage (`champion`), `exp:NAME` or `exp:` for DVC's experiments.",
        ),
    ] = None,
    of_project: Annotated[
        str | None,
        typer.Option("--project", metavar="ENTITY/PROJECT", help="Also compare the runs of a project at a W&B server."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=writable,
            help="With runs to compare: the page to write; default: `reports/comparison.html`.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Without arguments write the last run's page, `reports/review.html`, again; otherwise compare the named runs.

    The comparison is a table, best test loss first, the champion with a star, and a page with curves, parameters and
    answers. Every page is one file that needs no network.
    """
    names = [*(runs or []), *([f"wandb:{of_project}"] if of_project else [])]
    if not names and out is not None:
        raise typer.BadParameter(
            "it needs runs to compare; the last run's page is reports/review.html", param_hint="--out"
        )
    if not names:
        with errors(), project() as (params, paths):
            from flows.review.page import write_review

            page = write_review(params, paths)
            print(json.dumps({"page": str(page)}) if as_json else page)
        return
    with errors():
        from flows.review.comparison import compare
        from flows.review.comparison_page import write_comparison
        from flows.review.comparison_table import print_comparison
        from flows.review.sources import pipeline_root, read_runs

        root = pipeline_root()
        comparison = compare(read_runs(names, root))
        folder = Path("reports") if root is None else root / "reports"
        page = write_comparison(comparison, out or folder / "comparison.html", " · ".join(names)).resolve()
        if as_json:
            print(json.dumps({"page": str(page), **comparison.as_dict()}, indent=2))
            return
        console = Console(highlight=False)
        print_comparison(comparison, console)
        console.print(f"[dim]page[/] {page}", soft_wrap=True)


def trial(
    overrides: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE...", help="Parameters, such as `train.learning_rate=1e-3`.")
    ],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the DVC experiment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline once with other parameters, outside of the working tree, as a DVC experiment.

    A trial registers nothing. Stages that do not depend on the parameters come from DVC's cache. W&B's agents run
    trials by `sweeps/learning-rate.yaml`. `peftcore review exp:` compares experiments, and `dvc exp apply NAME` takes
    one over.
    """
    with errors(), project() as (_, paths):
        from flows.scaling.experiment import run_experiment

        warn_of_other_version(paths.root)
        with one_document(as_json):
            experiment = run_experiment(paths.root, overrides, name)
        from flows.review.comparison import compare
        from flows.review.comparison_table import print_comparison
        from flows.review.sources import read_runs

        runs = read_runs([f"exp:{experiment}"], paths.root)
        if as_json:
            print(json.dumps({"experiment": experiment, "metrics": runs[0].summary}, indent=2))
            return
        console = Console(highlight=False)
        print_comparison(compare(runs), console)
        console.print(f"{experiment}: `dvc exp apply {experiment}` takes it over", soft_wrap=True)
