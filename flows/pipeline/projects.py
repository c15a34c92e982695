"""Status of all projects of a git repository, as a table's rows and as one page.

A project that cannot be read (a broken params.yaml, no commit yet) has a row with its error, so one project never hides
the others.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from flows.errors import PipelineError
from flows.params import load_params
from flows.paths import Paths
from flows.pipeline.status import next_step, status
from peftcore.files import write_atomically

COLUMNS = ("project", "folder", "champion", "newest", "last run", "retraining", "next")


@dataclass(frozen=True)
class ProjectStatus:
    """One project: its folder, name and the result of `flows.pipeline.status.status`; or the error."""

    folder: str
    """The project's folder, from the repository's top."""
    name: str
    facts: dict[str, Any] | None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the texts of `COLUMNS`."""
        if self.facts is None:
            return self.name, self.folder, "", "", "", "", f"cannot be read: {self.error}"
        champion, newest = self.facts["champion"], self.facts["candidate"]
        run, retraining = self.facts["last_run"], self.facts["retraining"]
        loss = f", test loss {champion['test_loss']:.3f}" if champion and champion["test_loss"] is not None else ""
        schedule = retraining["schedule"]
        when = f"next {schedule['next']}" if schedule else "no schedule"
        last = f"{retraining['last']['outcome']}, " if retraining["last"] else ""
        working = ", ".join(one["what"] for one in self.facts["running"])
        return (
            self.name,
            self.folder,
            f"{champion['version'] or 'a commit without a version'}{loss}" if champion else "none",
            f"{newest['version']}, {newest['verdict']}" if newest else "none",
            f"{working} is at work" if working else f"{run['outcome']} {run['finished']}" if run else "none",
            last + when,
            next_step(self.facts),
        )


def statuses(roots: Sequence[Path]) -> list[ProjectStatus]:
    """Return the status of each project.

    Args:
        roots: The projects' folders, as `flows.runtime.project.project_roots` returns them.
    """
    return [_status(root) for root in roots]


def _status(root: Path) -> ProjectStatus:
    folder = f"{root.parent.name}/{root.name}" if not (root / ".git").exists() else "."
    try:
        params = load_params(Paths(root).params)
        return ProjectStatus(folder, params.project.name, status(params, Paths(root)))
    except PipelineError as error:
        return ProjectStatus(folder, root.name, None, str(error))


def write_projects_page(rows: Sequence[ProjectStatus], file: Path) -> None:
    """Write one HTML page with a table of all projects; a project's name leads to its review page, if there is one.

    Args:
        rows: The projects.
        file: The page, at the top of the repository, so that links to the projects' pages are relative to it.
    """
    head = Markup("").join(Markup("<th>{}</th>").format(column) for column in COLUMNS)
    body = Markup("").join(Markup("<tr>{}</tr>\n").format(_cells(row, file)) for row in rows)
    now = datetime.now(UTC).isoformat(timespec="minutes")
    write_atomically(file, PAGE.format(count=len(rows), now=now, head=head, body=body))


def _cells(row: ProjectStatus, file: Path) -> Markup:
    name, *others = row.cells()
    review = Paths(Path(row.folder)).review
    if (file.parent / review).is_file():
        name = Markup('<a href="{}">{}</a>').format(review.as_posix(), name)
    return Markup("").join(Markup("<td>{}</td>").format(cell) for cell in (name, *others))


PAGE = Markup("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Projects</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid #ddd; }}
</style>
<h1>{count} projects</h1>
<table>
<tr>{head}</tr>
{body}</table>
<p>Written {now} UTC by <code>peftcore status --all --page</code>.</p>
</html>
""")
