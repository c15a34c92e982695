"""Rebuild a version from its own commit, in a working tree of its own, and compare the results.

The commit has the code, the parameters and the dvc.lock of the run. Fetched inputs (the base, files that DVC tracks)
are taken by their hash from the lock. Every later stage runs again, with the commit's own code, and its outputs do not
enter DVC's cache. All comparisons ignore times.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from ruamel.yaml import YAML
from safetensors import SafetensorError, deserialize

from flows.errors import RegistryError, RepositoryError, StageError
from flows.params import Params, source_names
from flows.paths import Paths
from flows.registry.comparison import differences
from flows.registry.lineage import LOCK, headline_metrics, this_machine, this_software
from flows.registry.project_registry import registry_of
from flows.registry.reader import Version
from flows.registry.registry import ADDED, RAN
from flows.runtime.git import Git
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.project import dvc, files_at, stage_order
from flows.runtime.stage_process import run_stage
from flows.runtime.worktree import worktree_at
from peftcore.files import sha256

logger = logging.getLogger(__name__)

INPUT, LAST = "fetch", "register"
"""The stage whose outputs are taken by their hash, and the stage with side effects; neither runs again."""
TIMES = (
    *("seconds", "tokens_per_second", "token_ms", "first_token_ms", "peak_memory"),
    *("wandb_run_id", "tracking_runs"),
)
"""Keys of the stages' JSON files that differ between any two runs: times, memory, the ids of runs."""
PARTS = ("adapter", "evidence", "outs", "metrics")
"""Compared parts of a reproduction, in the order of the report."""
_OPTIONS = ("--no-run-cache", "--no-commit")
_FLOATS = {"F64": numpy.float64, "F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}


class Compared(NamedTuple):
    """A file or figure as registered and as rebuilt. detail: the difference, if it can be determined."""

    name: str
    registered: Any
    rebuilt: Any
    same: bool
    detail: str = ""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a rebuilt version with the registered one."""

    version: str
    stages: list[str]
    """Stages that ran again."""
    adapter: list[Compared]
    """The adapter's files; empty if the rebuild stopped before the train stage."""
    evidence: list[Compared]
    """Files of the evaluation and the merge, as far as they were made."""
    outs: list[Compared]
    metrics: list[Compared]
    other: list[tuple[str, Any, Any]]
    """Differences of software and machine: (name, then, now)."""

    @property
    def same(self) -> bool:
        """True if the adapter is equal in every byte; without an adapter, if every rebuilt output is equal."""
        return all(one.same for one in self.adapter or self.outs)

    @property
    def sentence(self) -> str:
        """The result in one line."""
        subject = "adapter" if self.adapter else "files"
        if self.same:
            return f"{self.version} is reproduced: the same {subject}, byte for byte"
        failed = f"{self.version} is not reproduced: other {subject}"
        if not self.other:
            return f"{failed}; software and machine are the same, so a stage is not deterministic"
        other = ", ".join(f"{name} was {then}, is {now}" for name, then, now in self.other)
        return f"{failed}; other software or machine: {other}"

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as values that JSON can hold."""
        parts = {name: [one._asdict() for one in getattr(self, name)] for name in PARTS}
        other = [{"name": name, "then": then, "now": now} for name, then, now in self.other]
        return {"version": self.version, "same": self.same, "stages": self.stages, **parts, "other": other}


def reproduce(params: Params, paths: Paths, number: str, timeout: float, until: str | None = None) -> Reproduction:
    """Rebuild a version and compare it with the registered one. The user's files stay unchanged.

    Args:
        params: the project's parameters.
        paths: the repository.
        number: the version's number.
        timeout: seconds for each stage.
        until: the last stage to run; None runs all.

    Raises:
        RegistryError: the version or its inputs are missing.
        StageError: a stage failed, or `until` is not a stage of the version.
        RepositoryError: git or DVC failed.
        DataError: the version's commit does not have its data.
    """
    registry = registry_of(params, paths.root)
    version = registry.version(number)
    record = registry.record(version)
    for source in source_names(record["params"]["data"]):
        what = f"{version.tag}, which was registered without it,"
        check_source_is_tracked(registry.git, source, what, version.commit)
    with worktree_at(paths.root, version.commit) as tree:
        at = Paths(tree)
        registered = _outs(at)
        ran = _stages(at, registered, until)
        _take_inputs(at, registered)
        if lost := [path for path in record["git"]["uncommitted"] if not (tree / path).exists() or not _is_held(path)]:
            logger.warning(
                "%s was made with uncommitted files that its commit does not have: %s", version.tag, ", ".join(lost)
            )
        for done, stage in enumerate(ran):
            run_stage(tree, stage, timeout, True, f"{done}/{len(ran)}", _OPTIONS)
        rebuilt = _outs(at)
        names = [path for stage in ran for path in rebuilt[stage]]
        before = {path: digest for outs in registered.values() for path, digest in outs.items()}
        after = {path: digest for outs in rebuilt.values() for path, digest in outs.items()}
        changed = [path for path in names if before.get(path) != after[path]]
        differing = {path: _differing_files(paths, version, at, path) for path in changed}
        outs = [_out(path, before.get(path), after[path], differing.get(path, [])) for path in names]
        adapter = _adapter(paths, version, record, at) if at.adapter.relative_to(tree).as_posix() in names else []
        evidence = _evidence(record, at, differing)
        metrics = _metrics(record, at)
    now = {"software": this_software(), "machine": this_machine()}
    then = {part: record.get(part) or now[part] for part in now}
    other = [(one.key, one.before, one.after) for one in differences(then, now)]
    return Reproduction(version.number, ran, adapter, evidence, outs, metrics, other)


def _outs(at: Paths) -> dict[str, dict[str, str]]:
    """Return {stage: {out: DVC's hash}} of dvc.lock."""
    stages = YAML(typ="safe").load(at.root / LOCK)["stages"]
    return {
        stage: {out["path"]: out["md5"] for out in entry.get("outs", []) if "md5" in out}
        for stage, entry in stages.items()
    }


def _is_held(path: str) -> bool:
    """Return True if a version's commit has the file's content from the run, even if it was uncommitted then."""
    return path in ADDED or any(path.startswith(f"{folder}/") for folder in RAN)


def _stages(at: Paths, registered: dict[str, Any], until: str | None) -> list[str]:
    """Return the stages to run, in order. Raises StageError if `until` is not one of them."""
    order = [stage for stage in stage_order(at.root) if stage in registered and stage not in (INPUT, LAST)]
    if until is None:
        return order
    if until not in order:
        raise StageError(f"--until {until}: the version has no such stage to run again; give one of {', '.join(order)}")
    return order[: order.index(until) + 1]


def _take_inputs(at: Paths, registered: dict[str, Any]) -> None:
    """Get the outputs of the fetch stage and the files that DVC tracks from DVC's cache or remote."""
    tracked = Git(at.root).run("ls-files", "-z", "*.dvc").split("\0")
    inputs = [name for name in (*([INPUT] if INPUT in registered else []), *tracked) if name]
    try:
        if inputs:
            dvc(at.root, "pull", *inputs)
    except RepositoryError as error:
        raise RegistryError(
            f"the inputs of the version are not available ({error}); `dvc push` them from a machine that has them"
        ) from error


def _differing_files(paths: Paths, version: Version, at: Paths, out: str) -> list[Compared]:
    """Return an output's files that differ apart from times; one entry if the registered output is not available."""
    try:
        with files_at(paths.root, version.commit, [out]) as folder:
            return list(_compare_folders(folder / out, at.root / out))
    except RepositoryError as error:
        return [Compared(out, "not available", "", False, str(error).strip().splitlines()[-1])]


def _compare_folders(then: Path, now: Path) -> Iterator[Compared]:
    if then.is_file():
        pairs = {then.name: (then, now)}
    else:
        names = {path.relative_to(top).as_posix() for top in (then, now) for path in top.rglob("*") if path.is_file()}
        pairs = {name: (then / name, now / name) for name in sorted(names)}
    for name, both in pairs.items():
        digests = [sha256(path) if path.is_file() else None for path in both]
        if digests[0] == digests[1] or (None not in digests and without_times(both[0]) == without_times(both[1])):
            continue
        detail = largest_difference(*both) if None not in digests else "only on one side"
        yield Compared(name, digests[0], digests[1], False, detail)


def without_times(path: Path) -> Any:
    """Return a file's content: parsed and without the keys of TIMES for .json and .jsonl, else bytes."""
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _timeless(json.loads(content))
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in content.splitlines()]
    except ValueError:
        return content
    return content


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def largest_difference(then: Path, now: Path) -> str:
    """Return the largest absolute difference between two safetensors files and its tensor; empty for other files."""
    if then.suffix != ".safetensors":
        return ""
    try:
        tensors = [dict(deserialize(path.read_bytes())) for path in (then, now)]
    except SafetensorError as error:
        return f"not readable: {error}"
    before, after = ({name: (t["dtype"], t["shape"]) for name, t in side.items()} for side in tensors)
    if before != after:
        return "other tensors or other shapes"
    largest = [(_largest(*(side[name] for side in tensors)), name) for name in before]
    value, name = max(largest, default=(0.0, ""))
    return f"largest difference {value:.3g}, in {name}"


def _largest(then: Any, now: Any) -> float:
    """Return the largest difference of two serialised tensors; infinite for NaN, and for types that numpy lacks."""
    if then["data"] == now["data"]:
        return 0.0
    if then["dtype"] not in _FLOATS:
        return float("inf")
    left, right = (numpy.frombuffer(side["data"], _FLOATS[side["dtype"]]) for side in (then, now))
    if then["dtype"] == "BF16":  # the upper half of a float32
        left, right = ((side.astype(numpy.uint32) << 16).view(numpy.float32) for side in (left, right))
    difference = float(numpy.abs(left.astype(numpy.float64) - right.astype(numpy.float64)).max())
    return difference if numpy.isfinite(difference) else float("inf")


def _out(path: str, then: str | None, now: str, files: Sequence[Compared]) -> Compared:
    same = then == now or (then is not None and not files)
    details = [f"{one.name} ({one.detail or 'another content'})" for one in files]
    detail = ", ".join(details) or ("" if then == now else "equal except for times")
    return Compared(path, then, now, same, detail)


def _adapter(paths: Paths, version: Version, record: dict[str, Any], at: Paths) -> list[Compared]:
    """Compare each file of the registered manifest except README.md."""
    files = {name: digest for name, digest in record["adapter"]["files"].items() if not name.endswith(".md")}
    rebuilt = {name: sha256(at.adapter / name) if (at.adapter / name).is_file() else None for name in files}
    if files == rebuilt:
        details: dict[str, str] = {}
    else:
        out = at.adapter.relative_to(at.root).as_posix()
        details = {one.name: one.detail for one in _differing_files(paths, version, at, out)}
    return [
        Compared(name, files[name], rebuilt[name], files[name] == rebuilt[name], details.get(name, ""))
        for name in files
    ]


def _evidence(record: dict[str, Any], at: Paths, changed: Mapping[str, list[Compared]]) -> list[Compared]:
    """Compare the files that the version was judged by. changed: {out: its differing files}."""
    differing = {
        out if one.name in (out, Path(out).name) else f"{out}/{one.name}": one.detail or "another content"
        for out, files in changed.items()
        for one in files
    }
    return [
        Compared(name, digest, now := sha256(at.root / name), name not in differing,
                 differing.get(name, "" if now == digest else "equal except for times"))
        for name, digest in record["evidence"].items()
        if (at.root / name).is_file()
    ]  # fmt: skip


def _metrics(record: dict[str, Any], at: Paths) -> list[Compared]:
    """Compare the headline metrics; empty if the rebuild stopped before they were made."""
    if not (at.evaluation_metrics.exists() and at.merge_report.exists() and at.training_summary.exists()):
        return []
    then, now = (dict(_figures(metrics)) for metrics in (record["metrics"], headline_metrics(at)))
    return [Compared(key, then.get(key), now.get(key), then.get(key) == now.get(key)) for key in {**then, **now}]


def _figures(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in _timeless(value).items():
        if isinstance(inner, dict):
            yield from _figures(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
