"""Commands of retraining: retrain and schedule."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from flows.commands.common import AsJson, PushTo, errors, one_document, warn_of_other_version
from flows.errors import GateError
from flows.paths import Paths
from flows.runtime.project import find_root, set_prefect_environment
from flows.runtime.stage import fail


def retrain(
    force: Annotated[bool, typer.Option("--force", help="Train even if there are no new files.")] = False,
    trust: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Only trust an excluded or quarantined file: the next retraining trains and evaluates on it.",
        ),
    ] = None,
    release: Annotated[
        str | None, typer.Option(hidden=True, help="Deprecated name of --trust.", metavar="FILE")
    ] = None,
    push_to: PushTo = None,
    as_json: AsJson = False,
) -> None:
    """Train on new data in a working tree of its own, judge the candidate by the gate, promote it or keep the champion.

    The section `retrain` of `params.yaml` sets where data come in, the start of the training, and whom to notify. A
    retraining uses committed files only and names uncommitted ones. An interrupted retraining is continued. The history
    is `reports/retraining/index.html`. Exit codes: 0, promoted or no new data; 1, a stage failed; 3, the gate refused;
    4, busy: a retraining runs already.
    """
    with errors():
        paths = Paths(find_root())
        set_prefect_environment(paths.root)
        if release is not None:
            print("warning: --release is deprecated; use --trust", file=sys.stderr)
        if (name := release if trust is None else trust) is not None:
            if force or push_to is not None:
                raise typer.BadParameter("it only trusts a file; leave --force and --push-to out", param_hint="--trust")
            from flows.retraining.committed import head_params
            from flows.retraining.trust import trust as trust_file
            from flows.runtime.git import Git

            trusted = trust_file(head_params(Git(paths.root)), paths, name)
            # "released": the key of earlier releases
            document = {"trusted": trusted, "released": trusted}
            print(json.dumps(document) if as_json else f"the next retraining trains and evaluates on {name}")
            return
        from flows.retraining.flow import run_retraining

        warn_of_other_version(paths.root)
        with one_document(as_json):
            entry = run_retraining(paths.root, push_to, force)
        if as_json:
            print(json.dumps(asdict(entry) | {"history": str(paths.retraining_page)}, indent=2))
        else:
            times = " · ".join(f"{name} {seconds:.1f}" for name, seconds in entry.seconds.items())
            print(f"{entry.outcome}; {entry.reason}")
            print(f"seconds {times}\npage    {paths.retraining_page}")
        if entry.outcome == "kept" and entry.promotion and entry.promotion["outcome"] == "refused":
            fail(entry.reason, GateError.status)


def schedule(
    cron: Annotated[
        str, typer.Option(metavar="MIN HOUR DAY MONTH WEEKDAY", help="The schedule as a cron expression.")
    ] = "0 3 * * 1",
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone of the schedule.")] = "UTC",
    push_to: PushTo = None,
) -> None:
    """Retrain on a schedule, on a machine without a Prefect server, until SIGTERM or Ctrl-C.

    One retraining runs at a time. A retraining that is due while another runs waits for it. With a Prefect server use
    `prefect deploy --all` and a worker instead (`prefect.yaml`).
    """
    with errors():
        paths = Paths(find_root())
        set_prefect_environment(paths.root)
        warn_of_other_version(paths.root)
        from flows.retraining.schedule import serve

        serve(paths, cron, timezone, push_to)
