"""Re-evaluation where the two versions have different test rows: each version on the other version's rows.

Test rows that a version was itself trained or validated on would flatter the version, so they are left out or reported
apart. Such a row has the id or the prompt of a row in the data of the version, or of a version that its training
started from. A version is measured with the storage that its own training used. The measurement runs in a process of
its own, because nothing here imports torch.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyarrow
from pyarrow import parquet
from pydantic import ValidationError

from flows.base.calibrated import calibrated_identity
from flows.base.identity import is_base
from flows.data.canonical import canonical
from flows.errors import GateError, StageError
from flows.gate.candidate import Candidate, Reevaluation
from flows.params import Params
from flows.paths import Paths
from flows.registry.lineage import read_json
from flows.registry.reader import RegistryReader, Version
from flows.registry.registered_files import check_adapter, files_of
from flows.runtime.project import stage_environment
from peftcore.files import sha256

CODE = Path(__file__).parents[2]
"""The folder of this package. The measuring process runs this code, whatever working tree is judged."""
Result = TypeVar("Result")
TEXTS = ("prompt", "text", "query")
"""Text columns; prepared rows have one of them: the question, the text to classify, or the query."""


def reevaluate_champion(
    params: Params,
    paths: Paths,
    registry: RegistryReader,
    champion: Version,
    candidate: Candidate,
    taken_from: Version | None,
) -> Reevaluation:
    """Measure the champion on the candidate's test rows.

    Args:
        params: the rules, for the batch sizes of the measurement.
        paths: the repository.
        registry: the registry.
        champion: the version to measure.
        candidate: the version whose test rows are used.
        taken_from: the registered version to take the candidate's files from; None takes the files of the last run.

    Raises:
        GateError: the two versions cannot be compared.
        RegistryError: files differ from the registered ones.
        StageError: the measurement failed.
    """
    with ExitStack() as stack:
        champion_files = _files(stack, paths, registry, champion)
        candidate_files = (
            paths if taken_from is None else stack.enter_context(files_of(paths, registry, taken_from, [paths.data]))
        )
        test = test_file(candidate_files, candidate.metrics["evaluation_set"], candidate.version)
        labels = _same_labels(params, registry, champion, candidate_files, champion_files)
        rows = _texts(test)[: candidate.rows.num_rows]
        unlearned = _not_learned(paths, registry, champion, champion_files, rows)
        if not unlearned:
            return Reevaluation(_no_rows(), len(rows))
        base = _base(stack, paths, registry, champion, candidate, champion)
        version = registry.version(candidate.version)
        task = _task(params, registry, champion, base, champion_files.adapter, test, len(rows), labels, version)
        losses = _run(task | _metrics(params, paths, candidate))
        return Reevaluation(_selected(losses, unlearned), len(rows) - len(unlearned))


def reevaluate_candidate(
    params: Params,
    paths: Paths,
    registry: RegistryReader,
    champion: Version,
    candidate: Candidate,
    taken_from: Version | None,
) -> Reevaluation:
    """Re-evaluate the candidate on all of the champion's registered test rows.

    The result has the losses of all rows, and separately those of the rows that the candidate was not trained or
    validated on.

    The arguments and errors are those of `reevaluate_champion`.
    """
    version = registry.version(candidate.version)
    with ExitStack() as stack:
        champion_files = stack.enter_context(files_of(paths, registry, champion, [paths.data, paths.evaluation_rows]))
        candidate_files = paths if taken_from is None else _files(stack, paths, registry, version)
        test = test_file(champion_files, registry.record(champion)["evaluation_set"], champion.number)
        labels = _same_labels(params, registry, champion, candidate_files, champion_files)
        rows = _texts(test)[: parquet.read_metadata(champion_files.evaluation_rows).num_rows]
        unlearned = _not_learned(paths, registry, version, candidate_files, rows)
        base = _base(stack, paths, registry, champion, candidate, version)
        task = _task(params, registry, version, base, candidate_files.adapter, test, len(rows), labels, champion)
        if candidate.metrics["evaluation_set"] == registry.record(champion)["evaluation_set"]:
            task |= _metrics(params, paths, candidate)  # rules and the judge compare on the candidate's rows
        losses = _run(task)
        return Reevaluation(_selected(losses, unlearned), len(rows) - len(unlearned), losses)


def reevaluate_suites(
    params: Params, paths: Paths, registry: RegistryReader, champion: Version, candidate: Candidate
) -> dict[str, Any]:
    """Let the champion answer the prompt suites of the rules; returns the content of suites.json.

    The arguments and errors are those of `reevaluate_champion`.
    """
    with ExitStack() as stack:
        task = _task_of_model(stack, params, paths, registry, champion, candidate)
        task["system_prompt"] = params.data.system_prompt
        return run_process("flows.stages.reevaluate_suites", task, "suites.json", read_json)


def reevaluate_benchmarks(
    params: Params, paths: Paths, registry: RegistryReader, champion: Version, candidate: Candidate
) -> dict[str, Any]:
    """Measure the champion on the benchmarks of the rules; returns {name: {"identity", "adapter": figures}}.

    The arguments and errors are those of `reevaluate_champion`.
    """
    with ExitStack() as stack:
        task = _task_of_model(stack, params, paths, registry, champion, candidate)
        return run_process("flows.stages.reevaluate_benchmarks", task, "benchmarks.json", read_json)


def _task_of_model(
    stack: ExitStack,
    params: Params,
    paths: Paths,
    registry: RegistryReader,
    champion: Version,
    candidate: Candidate,
) -> dict[str, Any]:
    """Return the keys of a task that need the champion's model alone, not its data."""
    at = stack.enter_context(files_of(paths, registry, champion, [paths.adapter]))
    check_adapter(at.adapter, registry, champion)
    return {
        "version": champion.number,
        "params": measured_with(params, registry, champion),
        "base": str(_base(stack, paths, registry, champion, candidate, champion).absolute()),
        "adapter": str(at.adapter.absolute()),
        "root": str(paths.root.absolute()),
    }


def _files(stack: ExitStack, paths: Paths, registry: RegistryReader, version: Version) -> Paths:
    """Return a folder with a version's adapter and data, checked against its record."""
    at = stack.enter_context(files_of(paths, registry, version, [paths.adapter, paths.data]))
    check_adapter(at.adapter, registry, version)
    return at


def test_file(data: Paths, evaluation_set: str, version: str) -> Path:
    """Return the file of the test rows of an evaluation. Raises StageError if it is missing or another one."""
    test = data.split("test")
    if not test.exists() or sha256(test) != evaluation_set:
        raise StageError(
            f"{test} is missing or differs from the test rows that {version} was evaluated on, so the other version "
            "cannot be measured on them; run `peftcore run` again, or judge the version's own files with "
            "`peftcore promote --version`"
        )
    return test


def _same_labels(
    params: Params, registry: RegistryReader, champion: Version, ours: Paths, theirs: Paths
) -> list[str] | None:
    labels = read_json(ours.labels) if ours.labels.exists() else None
    if labels != (read_json(theirs.labels) if theirs.labels.exists() else None):
        raise GateError(
            f"{champion.number} has other classes than {', '.join(labels or ['none'])}, so the two cannot be "
            f"compared; free the stage with `gto deprecate {registry.name} {champion.number} {params.gate.stage}`"
        )
    return labels


def _not_learned(
    paths: Paths, registry: RegistryReader, version: Version, at: Paths, rows: list[dict[str, Any]]
) -> set[str]:
    """Return the ids of rows on which neither the version nor the versions before it in training were trained."""
    known = {one for data in data_of(paths, registry, version, at) for one in learned(data)}
    return {row["id"] for row in rows if row["id"] not in known and canonical(row["text"]) not in known}


def _base(
    stack: ExitStack,
    paths: Paths,
    registry: RegistryReader,
    champion: Version,
    candidate: Candidate,
    measured: Version,
) -> Path:
    """Return the base of the measured version: its calibrated one, or else the base that both versions have.

    Both are taken from this working tree if it has them, or from a version's run.
    """
    calibrated = registry.record(measured).get("calibrated_base")
    if calibrated is not None:
        if calibrated_identity(paths.calibrated) == calibrated:
            return paths.calibrated
        return stack.enter_context(files_of(paths, registry, measured, [paths.calibrated])).calibrated
    if is_base(paths.base, candidate.metrics):
        return paths.base
    return stack.enter_context(files_of(paths, registry, champion, [paths.base])).base


def _task(
    params: Params,
    registry: RegistryReader,
    version: Version,
    base: Path,
    adapter: Path,
    test: Path,
    rows: int,
    labels: list[str] | None,
    of_rows: Version,
) -> dict[str, Any]:
    """Return the task of measuring `version` on the test rows of the version `of_rows`."""
    return {
        "version": version.number,
        "params": _with_passages_of(measured_with(params, registry, version), registry.record(of_rows)["params"]),
        "base": str(base.absolute()),
        "adapter": str(adapter.absolute()),
        "test": str(test.absolute()),
        # all rows are measured, so that each row is in the batch, and has the loss, of an evaluation
        "rows": rows,
        "labels": labels,
    }


def _with_passages_of(measured: dict[str, Any], of_rows: dict[str, Any]) -> dict[str, Any]:
    """Return a version's parameters with those that give a reranker's test rows the passages of their evaluation.

    Args:
        measured: the parameters of the version to measure.
        of_rows: the recorded parameters of the version whose test rows they are.
    """
    train = measured["train"]
    if train["objective"] != "reranker" or of_rows["train"].get("objective") != "reranker":
        return measured
    reranker = train["reranker"] | {"negatives": of_rows["train"]["reranker"]["negatives"]}
    project = measured["project"] | {"seed": of_rows["project"]["seed"]}
    return measured | {"train": train | {"reranker": reranker}, "project": project}


def _metrics(params: Params, paths: Paths, candidate: Candidate) -> dict[str, Any]:
    """Return the keys of a task that ask for answers and metrics; empty without a judge, and rules that compare."""
    metrics = [rule.metric for rule in params.gate.rules if rule.compares and rule.metric != "loss"]
    metrics += ["answer"] if params.gate.judge.is_on else []
    if not metrics:
        return {}
    answers = candidate.rows.column("adapter_ended") if "adapter_ended" in candidate.rows.column_names else None
    ids = candidate.rows.column("id").to_pylist()
    limits = candidate.metrics.get("answers") or {}
    return {
        "metrics": metrics,
        "answered": [] if answers is None else [ids[i] for i, one in enumerate(answers.to_pylist()) if one is not None],
        "max_new_tokens": limits.get("max_new_tokens", params.evaluate.max_new_tokens),
        "root": str(paths.root.absolute()),
    }


def _selected(losses: pyarrow.Table, ids: set[str]) -> pyarrow.Table:
    return losses.filter(pyarrow.array([name in ids for name in losses["id"].to_pylist()]))


def data_of(paths: Paths, registry: RegistryReader, version: Version, at: Paths) -> Iterator[Paths]:
    """Yield folders with the data of a version, and of each version that its training started from."""
    yield at
    before = registry.record(version)["params"]["train"].get("start_from")
    if before is not None:
        earlier = registry.version(before)
        with files_of(paths, registry, earlier, [paths.data]) as where:
            yield from data_of(paths, registry, earlier, where)


def learned(data: Paths) -> set[str]:
    """Return ids and canonical texts of the training rows and of the validation rows, which stop training."""
    rows = [*_texts(data.split("train")), *_texts(data.split("validation"))]
    return {key for row in rows for key in (row["id"], canonical(row["text"]))}


def _texts(path: Path) -> list[dict[str, Any]]:
    try:
        column = next(name for name in TEXTS if name in parquet.read_schema(path).names)
        return parquet.read_table(path, columns=["id", column]).rename_columns(["id", "text"]).to_pylist()
    except (OSError, StopIteration, pyarrow.ArrowException) as error:
        raise StageError(f"{path} cannot be read as prepared rows ({error!r}); run `peftcore run` again") from error


def measured_with(params: Params, registry: RegistryReader, champion: Version) -> dict[str, Any]:
    """Return a version's own parameters with the evaluation section of `params`.

    Raises:
        StageError: another release wrote the parameters, and this release cannot read them.
    """
    # the gate's rules of the record may name metrics of scorers that it had, and nothing here reads them
    recorded = registry.record(champion)["params"] | {"evaluate": params.evaluate.model_dump(), "gate": {}}
    if params.train.objective == "grpo" and recorded["train"].get("objective", "sft") in ("sft", "grpo"):
        # the candidate's rewards; both objectives have the same test loss
        rewarded = {"objective": "grpo", "grpo": params.train.grpo.model_dump(), "distillation": {}}
        recorded["train"] = recorded["train"] | rewarded
    try:
        return Params.from_record(recorded).model_dump()
    except ValidationError as error:
        raise StageError(
            f"this release cannot read the parameters of {champion.tag} ({error}); measure it with the code that it "
            "was registered with"
        ) from error


def _no_rows() -> pyarrow.Table:
    return pyarrow.table({"id": pyarrow.array([], pyarrow.string()), "tokens": [], "adapter_loss": []})


def _run(task: dict[str, Any]) -> pyarrow.Table:
    """Return the rows that `flows.stages.reevaluate` measures in a subprocess. Raises StageError with its reason."""
    return run_process("flows.stages.reevaluate", task, "rows.parquet", parquet.read_table)


def run_process(
    module: str, task: dict[str, Any], name: str, read: Callable[[Path], Result], work: str | None = None
) -> Result:
    """Return what a measuring module writes.

    Args:
        module: The module, run as `python -m MODULE TASK.json NAME`.
        task: Content of TASK.json.
        name: Name of the output file.
        read: Reader of the output file.
        work: The work in words, for the message; None: the re-evaluation of the task's version.

    Raises:
        StageError: The module failed; the message has its reason.
    """
    work = f"the re-evaluation of {task['version']}" if work is None else work
    with TemporaryDirectory(prefix="peftcore-measure-") as folder:
        request, out = Path(folder) / "task.json", Path(folder) / name
        request.write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", module, str(request), str(out)]
        # some libraries print to stdout, which may have to hold one JSON document only
        done = subprocess.run(command, cwd=CODE, env=stage_environment(), stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            message = out.with_suffix(".txt")
            reason = (
                message.read_text(encoding="utf-8")
                if message.exists()
                else f"exit status {done.returncode}, see its output above"
            )
            raise StageError(f"{work} failed: {reason}")
        return read(out)
