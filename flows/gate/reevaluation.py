"""The champion on the candidate's test rows, and the candidate on the champion's, as where new data made new test rows.

Test rows that a version was itself trained or validated on would flatter it, and are told apart: those with the id or
the prompt of a row in the data of its version, or of a version that its training started from. It is measured with the
storage that its own training used, in a process of its own, because nothing here imports torch.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
from pyarrow import parquet
from pydantic import ValidationError

from flows.base.identity import is_base
from flows.data.canonical import canonical
from flows.errors import GateError, StageError
from flows.gate.candidate import Candidate, Remeasured
from flows.params import Params
from flows.paths import Paths
from flows.registry.lineage import read_json
from flows.registry.registered_files import check_adapter, files_of
from flows.registry.registry import Registry, Version
from flows.runtime.project import stage_environment
from peftcore.files import sha256

CODE = Path(__file__).parents[2]
"""Where this package lies: what measures is of the same code, whatever tree is judged."""
TEXTS = ("prompt", "text")
"""Columns of which prepared rows have one: what is asked, or what is classified."""


def measure_again(
    params: Params, paths: Paths, registry: Registry, champion: Version, candidate: Candidate, of: Version | None
) -> Remeasured:
    """The champion's losses on the candidate's test rows. of: whose files to take; None: those of the last run.

    Raises GateError where the two cannot be compared, RegistryError where files are not what was registered,
    StageError where the measuring fails.
    """
    with ExitStack() as stack:
        theirs = _files(stack, paths, registry, champion)
        ours = paths if of is None else stack.enter_context(files_of(paths, registry, of, [paths.data]))
        test = _test_rows(ours, candidate.metrics["evaluation_set"], candidate.version)
        labels = _same_labels(params, registry, champion, ours, theirs)
        rows = _texts(test)[: candidate.rows.num_rows]
        fresh = _not_learned(paths, registry, champion, theirs, rows)
        if not fresh:
            return Remeasured(_no_rows(), len(rows))
        base = _base(stack, paths, registry, champion, candidate)
        found = _run(_task(params, registry, champion, base, theirs.adapter, test, len(rows), labels))
        return Remeasured(_kept(found, fresh), len(rows) - len(fresh))


def measure_candidate(
    params: Params, paths: Paths, registry: Registry, champion: Version, candidate: Candidate, of: Version | None
) -> Remeasured:
    """The candidate's losses on the test rows that the champion was registered with, also those that it has learned.

    of, and what is raised, as in `measure_again`.
    """
    version = registry.version(candidate.version)
    with ExitStack() as stack:
        theirs = stack.enter_context(files_of(paths, registry, champion, [paths.data, paths.evaluation_rows]))
        ours = paths if of is None else _files(stack, paths, registry, version)
        test = _test_rows(theirs, registry.record(champion)["evaluation_set"], champion.number)
        labels = _same_labels(params, registry, champion, ours, theirs)
        rows = _texts(test)[: parquet.read_metadata(theirs.evaluation_rows).num_rows]
        fresh = _not_learned(paths, registry, version, ours, rows)
        base = _base(stack, paths, registry, champion, candidate)
        found = _run(_task(params, registry, version, base, ours.adapter, test, len(rows), labels))
        return Remeasured(_kept(found, fresh), len(rows) - len(fresh), found)


def _files(stack: ExitStack, paths: Paths, registry: Registry, version: Version) -> Paths:
    """Where a version's adapter and data lie, checked against its record."""
    at = stack.enter_context(files_of(paths, registry, version, [paths.adapter, paths.data]))
    check_adapter(at.adapter, registry, version)
    return at


def _test_rows(data: Paths, evaluation_set: str, version: str) -> Path:
    test = data.split("test")
    if not test.exists() or sha256(test) != evaluation_set:
        raise StageError(
            f"{test} is not what {version} was measured on, so the other version cannot be measured on it "
            "too; run `peftcore run` again, or judge the version's own files with `peftcore promote --version`"
        )
    return test


def _same_labels(params: Params, registry: Registry, champion: Version, ours: Paths, theirs: Paths) -> list[str] | None:
    labels = read_json(ours.labels) if ours.labels.exists() else None
    if labels != (read_json(theirs.labels) if theirs.labels.exists() else None):
        raise GateError(
            f"{champion.number} knows other classes than {', '.join(labels or ['none'])}, so the two cannot be "
            f"compared; free the stage with `gto deprecate {registry.name} {champion.number} {params.gate.stage}`"
        )
    return labels


def _not_learned(paths: Paths, registry: Registry, version: Version, at: Paths, rows: list[dict[str, Any]]) -> set[str]:
    """Ids of the rows that neither a version nor what its training started from was trained or validated on."""
    known = {one for data in data_of(paths, registry, version, at) for one in learned(data)}
    return {row["id"] for row in rows if row["id"] not in known and canonical(row["text"]) not in known}


def _base(stack: ExitStack, paths: Paths, registry: Registry, champion: Version, candidate: Candidate) -> Path:
    """The base of both versions: the one that is here, or that of the champion's run."""
    if is_base(paths.base, candidate.metrics):
        return paths.base
    return stack.enter_context(files_of(paths, registry, champion, [paths.base])).base


def _task(
    params: Params,
    registry: Registry,
    version: Version,
    base: Path,
    adapter: Path,
    test: Path,
    rows: int,
    labels: list[str] | None,
) -> dict[str, Any]:
    return {
        "version": version.number,
        "params": measured_with(params, registry, version),
        "base": str(base.absolute()),
        "adapter": str(adapter.absolute()),
        "test": str(test.absolute()),
        # all rows are measured, so that each has the batch, and the loss, that an evaluation would give it
        "rows": rows,
        "labels": labels,
    }


def _kept(found: pyarrow.Table, ids: set[str]) -> pyarrow.Table:
    return found.filter(pyarrow.array([name in ids for name in found["id"].to_pylist()]))


def data_of(paths: Paths, registry: Registry, version: Version, at: Paths) -> Iterator[Paths]:
    """Where the data of a version lie, and those of each version that its training started from."""
    yield at
    before = registry.record(version)["params"]["train"].get("start_from")
    if before is not None:
        earlier = registry.version(before)
        with files_of(paths, registry, earlier, [paths.data]) as where:
            yield from data_of(paths, registry, earlier, where)


def learned(data: Paths) -> set[str]:
    """Return ids and canonical texts of the rows that were trained on, or decided when training ended."""
    rows = [*_texts(data.split("train")), *_texts(data.split("validation"))]
    return {key for row in rows for key in (row["id"], canonical(row["text"]))}


def _texts(path: Path) -> list[dict[str, Any]]:
    try:
        column = next(name for name in TEXTS if name in parquet.read_schema(path).names)
        return parquet.read_table(path, columns=["id", column]).rename_columns(["id", "text"]).to_pylist()
    except (OSError, StopIteration, pyarrow.ArrowException) as error:
        raise StageError(f"{path} cannot be read as prepared rows ({error!r}); run `peftcore run` again") from error


def measured_with(params: Params, registry: Registry, champion: Version) -> dict[str, Any]:
    """A version's own parameters, in batches as they are now. Raises StageError for those of an older release."""
    given = registry.record(champion)["params"] | {"evaluate": params.evaluate.model_dump()}
    try:
        return Params.from_record(given).model_dump()
    except ValidationError as error:
        raise StageError(
            f"the parameters of {champion.tag} are not readable by this version of the code ({error}); measure it by "
            "the code that it was registered with"
        ) from error


def _no_rows() -> pyarrow.Table:
    return pyarrow.table({"id": pyarrow.array([], pyarrow.string()), "tokens": [], "adapter_loss": []})


def _run(task: dict[str, Any]) -> pyarrow.Table:
    """Measure in a process whose progress goes to this one's stderr. Raises StageError with its reason."""
    with TemporaryDirectory(prefix="peftcore-measure-") as folder:
        given, found = Path(folder) / "task.json", Path(folder) / "rows.parquet"
        given.write_text(json.dumps(task))
        command = [sys.executable, "-m", "flows.stages.reevaluate", str(given), str(found)]
        # libraries greet on stdout, where a verdict in JSON may have to stand alone
        done = subprocess.run(command, cwd=CODE, env=stage_environment(), stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            said = found.with_suffix(".txt")
            reason = said.read_text() if said.exists() else f"exit status {done.returncode}; what it said is above"
            raise StageError(f"{task['version']} could not be measured again: {reason}")
        return parquet.read_table(found)
