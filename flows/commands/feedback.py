"""Command feedback: recorded ratings as rows."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.commands.common import AsJson, errors, one_document
from flows.errors import RepositoryError
from flows.paths import Paths
from flows.runtime.project import find_root

if TYPE_CHECKING:
    from flows.feedback.collect import Report
    from flows.feedback.rows import FeedbackKind
    from flows.params import Params

PerUser = Annotated[int, typer.Option(min=0, metavar="N", help="Most ratings of one user, the newest; 0: no limit.")]


class Kind(StrEnum):
    """Kinds of rows that ratings give."""

    unpaired_preference = "unpaired_preference"
    preference = "preference"
    chat = "chat"


def feedback(
    records: Annotated[Path, typer.Argument(help="The folder that `peftcore serve --record` writes.")],
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="unpaired_preference (KTO), preference (DPO) or chat (SFT); default: the project's data.kind."
        ),
    ] = None,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="First time of a rating, UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Ratings before this time, UTC.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The new .jsonl; default: a file in `feedback/` of `retrain.incoming`."),
    ] = None,
    good: Annotated[float, typer.Option(min=0, max=1, help="Smallest rating of a good answer.")] = 0.75,
    bad: Annotated[float, typer.Option(min=0, max=1, help="Largest rating of a bad answer.")] = 0.25,
    per_user: PerUser = 50,
    named_only: Annotated[bool, typer.Option("--named-only", help="Leave out ratings without a user.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn the ratings of `peftcore serve --record` into rows for KTO, DPO or SFT.

    Contradictory ratings, duplicates, requests of earlier files, and rows of the test set are counted and left out. The
    next `peftcore retrain` takes the file in, and keeps it out of evaluation until `peftcore retrain --trust FILE`.
    """
    with errors():
        from flows.feedback.collect import collect
        from flows.feedback.ratings import Policy

        with one_document(as_json):
            project = _project()
            chosen = kind.value if kind is not None else _kind(project)
            policy = Policy(_utc(since), _utc(until), good, bad, per_user or None, named_only)
            report = collect(records, cast("FeedbackKind", chosen), policy, out, project)
        print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(_lines(report)))


def _project() -> "tuple[Params, Paths] | None":
    """Return the project of the current folder; None outside of a project."""
    from flows.params import load_params

    try:
        paths = Paths(find_root())
    except RepositoryError:
        return None
    return load_params(paths.params), paths


def _kind(project: "tuple[Params, Paths] | None") -> str:
    kinds = [kind.value for kind in Kind]
    if project is None or project[0].data.kind not in kinds:
        given = "there is no project here" if project is None else f"the project's data.kind is {project[0].data.kind}"
        raise typer.BadParameter(f"{given}; give one of {', '.join(kinds)}", param_hint="--kind")
    return project[0].data.kind


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)


def _lines(report: "Report") -> Iterator[str]:
    labels = ", ".join(f"{count} {label}" for label, count in sorted(report.labels.items(), reverse=True))
    yield f"{report.rows} rows{f' ({labels})' if labels else ''} of {report.ratings} ratings by {report.users} users"
    if report.anonymous:
        yield f"ratings   {report.anonymous} without a user, to which --per-user does not apply"
    if report.damaged_lines:
        yield f"records   {report.damaged_lines} damaged lines left out"
    for title, reasons in (("ratings", report.ratings_left_out), ("rows", report.rows_left_out)):
        for reason, count in reasons.items():
            yield f"{title:9} {count} left out: {reason}"
    if report.rows and report.compared_with is None:
        yield "rows      not compared with test rows: there are none yet"
    yield f"file      {report.path}" if report.path else "no file is written: there are no rows"
