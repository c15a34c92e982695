"""Retraining that runs alone: once, or on a schedule."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from flows.commands.common import AsJson, PushTo, errors, one_document
from flows.errors import GateError
from flows.paths import Paths
from flows.runtime.project import find_root, set_prefect_environment
from flows.runtime.stage import fail


def retrain(
    force: Annotated[bool, typer.Option("--force", help="Train even if nothing is new.")] = False,
    release: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Vouch for a file that is set aside or quarantined: the next retraining judges by it too; train not.",
        ),
    ] = None,
    push_to: PushTo = None,
    as_json: AsJson = False,
) -> None:
    """If there are new data: train on them in a working tree of its own, judge by the gate, promote or keep, report.

    The section `retrain` of `params.yaml` says where data come in, whether training starts anew or from the champion,
    and who is told. What is committed is what is trained, and what is not is named at once; an interrupted retraining
    is gone on with. The history of all is `reports/retraining/index.html`. Exits with 0 if it promoted or nothing is
    new, with 3 if the gate refused, with 4 if a retraining runs already, with 1 if a stage failed.
    """
    with errors():
        paths = Paths(find_root())
        set_prefect_environment(paths.root)
        if release is not None:
            from flows.retraining.committed import committed_params
            from flows.retraining.trust import trust
            from flows.runtime.git import Git

            released = trust(committed_params(Git(paths.root)), paths, release)
            told = f"{release} is taken by the next retraining, and judged by as well"
            print(json.dumps({"released": released}) if as_json else told)
            return
        from flows.retraining.flow import run_retraining

        with one_document(as_json):
            entry = run_retraining(paths.root, push_to, force)
        if as_json:
            print(json.dumps(asdict(entry) | {"history": str(paths.retraining_page)}, indent=2))
        else:
            took = " · ".join(f"{name} {seconds:.1f}" for name, seconds in entry.seconds.items())
            print(f"{entry.outcome}; {entry.reason}")
            print(f"seconds {took}\npage    {paths.retraining_page}")
        if entry.outcome == "kept" and entry.promotion and entry.promotion["outcome"] == "refused":
            fail(entry.reason, GateError.status)


def schedule(
    cron: Annotated[
        str, typer.Option(metavar="MIN HOUR DAY MONTH WEEKDAY", help="When, as cron has it.")
    ] = "0 3 * * 1",
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="That cron's hours are of.")] = "UTC",
    push_to: PushTo = None,
) -> None:
    """Retrain on a schedule, on a machine without a server: stays and works until it is stopped (SIGTERM, Ctrl-C).

    One retraining at a time: one that is due while another runs waits for it, and then finds nothing new. With a
    Prefect server use `prefect deploy --all` and a worker instead (`prefect.yaml`).
    """
    with errors():
        paths = Paths(find_root())
        set_prefect_environment(paths.root)
        from flows.retraining.schedule import serve

        serve(paths, cron, timezone, push_to)
