"""`peftcore feedback`: from a server's records to a file of rows that a retraining quarantines until it is trusted."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyarrow import parquet

from flows.base.folder import load_tokenizer
from flows.data.encoders import encoder_of
from flows.data.files import read_rows
from flows.data.sources import as_example
from flows.errors import DataError
from flows.feedback.ratings import Policy, verdicts
from flows.feedback.rows import FeedbackKind, Row, Rows, Texts, make_rows, without_known, without_test_rows
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.runtime.project import files_at
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)
COLUMNS = ("request_id", "model", "model_version", "week", "rater")
"""Columns of a row with its origin."""


@dataclass
class Report:
    """Counts of one run of `peftcore feedback`."""

    kind: str
    path: str | None
    """The file; None if there are no rows."""
    rows: int
    labels: dict[str, int]
    """unpaired_preference: rows by label."""
    ratings: int
    users: int
    anonymous: int
    """Ratings without a user, to which the limit per user does not apply."""
    damaged_lines: int
    compared_with: int | None
    """Test rows that the rows were compared with; None if there are none yet."""
    ratings_left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)


def collect(
    folder: Path, kind: FeedbackKind, policy: Policy, out: Path | None, project: tuple[Params, Paths] | None
) -> Report:
    """Write the rows of a folder of records to a new file.

    Args:
        folder: The folder that `peftcore serve --record` writes.
        kind: The kind of rows.
        policy: Choice of the ratings.
        out: The file; None: a file with the time in its name, in the folder `feedback` of `retrain.incoming`.
        project: The project whose rows they become; None: no project, so `out` is needed.

    Raises:
        ConfigError: The records cannot be read.
        DataError: The project has another kind of rows, or the file exists, would be trusted at once, or has no place.
    """
    from peftcore.serving import Records

    path = _destination(out, kind, project)
    if project is not None:
        _check_project(project[0], kind)
    records = Records(folder)
    judged = verdicts(records, policy)
    if records.damaged:
        logger.warning("%d damaged lines are left out, such as %s", len(records.damaged), records.damaged[0])
    rows = without_known(make_rows(judged.answers, kind), _known_requests(path))
    compared_with = None
    if project is not None and rows.rows:
        rows, compared_with = _without_test_rows(rows, *project)
    if rows.rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:  # another process has chosen the same name meanwhile
            raise DataError(f"{path} exists already; run this again, or give another name") from error
        try:
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.rows))
        except BaseException:
            path.unlink()  # an empty file would be in the way of the next try
            raise
    labels = Counter(str(row["label"]).lower() for row in rows.rows if "label" in row)
    return Report(
        kind,
        str(path) if rows.rows else None,
        len(rows.rows),
        dict(labels),
        judged.ratings,
        judged.users,
        judged.anonymous,
        len(records.damaged),
        compared_with,
        dict(judged.left_out.most_common()),
        dict(rows.left_out.most_common()),
    )


def _destination(out: Path | None, kind: FeedbackKind, project: tuple[Params, Paths] | None) -> Path:
    incoming = None
    if project is not None and project[0].retrain.incoming is not None:
        incoming = (project[1].root / Path(project[0].retrain.incoming).expanduser()).resolve()
    if out is None:
        if incoming is None:
            raise DataError(
                "give --out FILE.jsonl: there is no project here with retrain.incoming, the folder for new rows"
            )
        now = datetime.now(UTC)
        out = incoming / "feedback" / f"{kind}-{now:%Y%m%d-%H%M%S}.jsonl"
    if out.suffix != ".jsonl":
        raise DataError(f"--out {out}: give a name that ends in .jsonl")
    if out.exists():
        raise DataError(f"--out {out} exists already; give another name")
    if incoming is not None and project is not None and out.resolve().is_relative_to(incoming):
        name = out.resolve().relative_to(incoming).as_posix()
        if not project[0].retrain.is_untrusted(name):
            raise DataError(
                f"--out {out}: retrainings would trust this file at once, because {name} matches none of "
                f"retrain.untrusted ({', '.join(project[0].retrain.untrusted) or 'empty'}); put it into "
                f"{incoming / 'feedback'}, or add its name there"
            )
    return out


def _check_project(params: Params, kind: FeedbackKind) -> None:
    if params.data.kind != kind:
        raise DataError(
            f"--kind {kind}: the project's data.kind is {params.data.kind}, and a project trains on one kind of rows; "
            f"give --kind {params.data.kind}, or a project of its own"
        )
    for parameter in ("group_column", "slice_column"):
        column = getattr(params.data, parameter)
        if column is not None and column not in COLUMNS:
            raise DataError(
                f"data.{parameter} is {column}, which rows of feedback do not have; they have {', '.join(COLUMNS)}"
            )


def _known_requests(path: Path) -> set[str]:
    """Return the requests of earlier files in the folder of `path`."""
    files = sorted(path.parent.glob("*.jsonl"))
    return {row["request_id"] for file in files for _, row in read_rows(file, str(file)) if "request_id" in row}


def _without_test_rows(rows: Rows, params: Params, paths: Paths) -> tuple[Rows, int | None]:
    """Leave out rows that are in the test set, and return its number of rows; None if there is no test set yet."""
    with ExitStack() as stack:
        holder = registry_of(params, paths.root).stages().get(params.gate.stage)
        tree = paths
        if holder is not None and holder.version is not None:
            names = [paths.split("test")] + ([] if paths.base.exists() else [paths.base])
            relative = [path.relative_to(paths.root).as_posix() for path in names]
            tree = Paths(stack.enter_context(files_at(paths.root, holder.commit, relative)))
        if not tree.split("test").exists():
            logger.warning("there is no champion and no prepared test set yet, so no rows are compared with test rows")
            return rows, None
        test = _test_texts(tree.split("test"))
        texts_of = _encoded(params, paths.base if paths.base.exists() else tree.base)
        return without_test_rows(rows, texts_of, test, params.data.similarity), len(test)


def _encoded(params: Params, base: Path) -> Callable[[Row], Texts]:
    """Return a function of a row to its prompt and answer, as the prepare stage writes them."""
    encoder = encoder_of(params.data, load_tokenizer(base), [])

    def texts_of(row: Row) -> Texts:
        tokens = encoder.encode(as_example(params.data, "feedback", row))
        return tokens.question, tokens.answer

    return texts_of


def _test_texts(path: Path) -> Sequence[Texts]:
    """Return prompt and answer of each test row, as `question` and `answer` of `flows.data.tokens` have them."""
    rows = parquet.read_table(path).to_pylist()
    if rows and "chosen" in rows[0]:
        return [(row["prompt"], f"{row['chosen']}\n{row['rejected']}") for row in rows]
    marks = {True: "\ndesirable", False: "\nundesirable", None: ""}
    return [(row["prompt"], row["completion"] + marks[row.get("desirable")]) for row in rows]
