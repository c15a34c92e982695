"""The champion, measured again on the candidate's test rows, as where new data made new test rows.

Test rows that the champion was itself trained or validated on would flatter it, and are left out: those with the id or
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

from flows.errors import GateError, StageError
from flows.params import Params
from flows.paths import Paths
from flows.project import stage_environment
from flows.promotion.candidate import Candidate, Remeasured
from flows.promotion.lineage import read_json
from flows.promotion.registered_files import check_adapter, files_of
from flows.promotion.registry import Registry, Version
from peftcore.files import MANIFEST, sha256

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
        theirs = stack.enter_context(files_of(paths, registry, champion, [paths.adapter, paths.data]))
        check_adapter(theirs.adapter, registry, champion)
        ours = paths if of is None else stack.enter_context(files_of(paths, registry, of, [paths.data]))
        test = ours.split("test")
        if not test.exists() or sha256(test) != candidate.metrics["evaluation_set"]:
            raise StageError(
                f"{test} is not what {candidate.version} was measured on, so the champion cannot be measured on it "
                "too; run `peftcore run` again, or judge the version's own files with `peftcore promote --version`"
            )
        labels = read_json(ours.labels) if ours.labels.exists() else None
        if labels != (read_json(theirs.labels) if theirs.labels.exists() else None):
            raise GateError(
                f"{champion.number} knows other classes than {', '.join(labels or ['none'])}, so the two cannot be "
                f"compared; free the stage with `gto deprecate {registry.name} {champion.number} {params.gate.stage}`"
            )
        rows = _rows(test, candidate)
        known = {one for data in data_of(paths, registry, champion, theirs) for one in learned(data)}
        fresh = [row["id"] for row in rows if row["id"] not in known and row["text"] not in known]
        if not fresh:
            return Remeasured(_no_rows(), len(rows))
        base = paths.base
        if not (base / MANIFEST).exists() or sha256(base / MANIFEST) != candidate.metrics["base_model"]:
            base = stack.enter_context(files_of(paths, registry, champion, [paths.base])).base
        task = {
            "version": champion.number,
            "params": measured_with(params, registry, champion),
            "base": str(base.absolute()),
            "adapter": str(theirs.adapter.absolute()),
            "test": str(test.absolute()),
            "rows": len(rows),
            "labels": labels,
        }
        # all rows are measured, so that each has the batch, and the loss, that an evaluation would give it
        found = _run(task)
        kept = set(fresh)
        mask = pyarrow.array([name in kept for name in found["id"].to_pylist()])
        return Remeasured(found.filter(mask), len(rows) - len(fresh))


def _rows(test: Path, candidate: Candidate) -> list[dict[str, Any]]:
    """Ids and texts of the rows that the candidate was measured on, the first ones of its test rows."""
    return _texts(test)[: candidate.rows.num_rows]


def data_of(paths: Paths, registry: Registry, version: Version, at: Paths) -> Iterator[Paths]:
    """Where the data of a version lie, and those of each version that its training started from."""
    yield at
    before = registry.record(version)["params"]["train"].get("start_from")
    if before is not None:
        earlier = registry.version(before)
        with files_of(paths, registry, earlier, [paths.data]) as where:
            yield from data_of(paths, registry, earlier, where)


def learned(data: Paths) -> set[str]:
    """Ids and texts of the rows that were trained on, or decided when training ended."""
    rows = [*_texts(data.split("train")), *_texts(data.split("validation"))]
    return {row[name] for row in rows for name in ("id", "text")}


def _texts(path: Path) -> list[dict[str, Any]]:
    try:
        column = next(name for name in TEXTS if name in parquet.read_schema(path).names)
        return parquet.read_table(path, columns=["id", column]).rename_columns(["id", "text"]).to_pylist()
    except (OSError, StopIteration, pyarrow.ArrowException) as error:
        raise StageError(f"{path} cannot be read as prepared rows ({error!r}); run `peftcore run` again") from error


def measured_with(params: Params, registry: Registry, champion: Version) -> dict[str, Any]:
    """The champion's own parameters, in batches as they are now. Raises StageError for those of an older release."""
    given = registry.record(champion)["params"] | {"evaluate": params.evaluate.model_dump()}
    try:
        return Params.model_validate(given).model_dump()
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
        command = [sys.executable, "-m", "flows.judging.remeasure", str(given), str(found)]
        # libraries greet on stdout, where a verdict in JSON may have to stand alone
        done = subprocess.run(command, cwd=CODE, env=stage_environment(), stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            said = found.with_suffix(".txt")
            reason = said.read_text() if said.exists() else f"exit status {done.returncode}; what it said is above"
            raise StageError(f"{task['version']} could not be measured again: {reason}")
        return parquet.read_table(found)
