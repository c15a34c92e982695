"""Promote a version: judge it by the gate against the champion, then give it the stage as a compare-and-swap."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow
from pyarrow import parquet

from flows.base.identity import base_identity, have_same_base
from flows.errors import RegistryError, StageError
from flows.gate.candidate import Candidate, Champion
from flows.gate.checks.measured import unmeasured
from flows.gate.gate import GateReport, evaluate_gate
from flows.gate.looks import looks_of
from flows.gate.reevaluation import measure_again, measure_candidate
from flows.params import Params
from flows.paths import Paths
from flows.registry.approvals import approvals, unsigned_approvals
from flows.registry.lineage import read_json
from flows.registry.project_registry import registry_of
from flows.registry.registered_files import check_adapter, files_of
from flows.registry.registry import Assignment, Registry, Version
from flows.registry.signatures import allowed_signers, signature_of
from flows.registry.synchronise import synchronise
from peftcore.files import MANIFEST, damaged_files, sha256, write_atomically

Outcome = Literal["promoted", "already", "refused", "would promote", "rolled back"]
_REPORT = "Gate report: "
FOUNDED = (
    *("slice", "weight", "base_loss", "label"),
    *(f"{side}_{name}" for side in ("base", "adapter") for name in ("rouge_l", "ended", "margin", "prediction")),
)
"""Columns of the rows, where there are any, that figures follow from."""
CONTROL = ("tokens", "base_loss", "adapter_loss")
"""Columns of the control set's losses that are judged."""


@dataclass(frozen=True)
class Promotion:
    """What came of it. report: None only where somebody gave the stage without the gate, by hand."""

    name: str
    version: str
    stage: str
    outcome: Outcome
    tag: str | None
    report: GateReport | None

    @property
    def accepted(self) -> bool:
        return self.outcome != "refused"

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        model = f"{self.name} {self.version}"
        if self.outcome == "already":
            return f"{model} is {self.stage} already"
        if self.outcome == "refused":
            reason = self.report.reason if self.report else "no reason given"
            return f"{model} is not promoted to {self.stage}: {reason}"
        if self.outcome == "rolled back":
            return f"{model} is {self.stage} again"
        return f"{model} {'is' if self.outcome == 'promoted' else 'would become'} {self.stage}"

    def as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("name", "version", "stage", "outcome", "tag")}
        return {**fields, "report": self.report.as_dict() if self.report else None}


def promote(
    params: Params,
    paths: Paths,
    version: str | None = None,
    dry_run: bool = False,
    push_to: str | None = None,
    again: bool = False,
) -> Promotion:
    """Judge a version and, if it passes, give it the stage `gate.stage`.

    params: the rules; what the version was measured by has to be what they ask for. version: its number; None is the
    one of the last run. dry_run: judge only. push_to: a git remote that must agree. again: judge it even if the stage
    was taken back from it, as by a rollback.
    The result is kept in reports/promotion.json, for the page. Raises RegistryConflict if the stage changed hands
    while the gate was at work.
    """
    registry = registry_of(params, paths.root, sign=True)
    if push_to is not None:
        version = synchronise(registry, push_to).get(version or "", version)
    # before anything is compared: whoever promotes after this makes our tag impossible
    looked_at = registry.last_event()
    chosen = registry.version(version) if version else last_version(registry, paths)
    holder = registry.stages().get(params.gate.stage)
    if holder is not None and holder.version == chosen.number:
        if push_to is not None and not dry_run:
            registry.push_again(push_to, chosen, holder)
        promotion = Promotion(registry.name, chosen.number, params.gate.stage, "already", None, _report_of(holder))
    else:
        report = _judge(params, paths, registry, chosen, holder, version is None, again)
        promotion = _decide(params, registry, chosen, report, looked_at, dry_run, push_to)
    if not dry_run:
        write_atomically(paths.promotion, json.dumps(promotion.as_dict(), indent=2) + "\n")
    return promotion


def roll_back(
    params: Params, paths: Paths, reason: str, version: str | None = None, push_to: str | None = None
) -> Promotion:
    """Give the stage back to a version that had it before; the tag says who did it, why, and from which version.

    version: its number; None is the one that had it last before the present holder. Its files have to be those that
    were registered; the gate is not asked again, what it said then is in the tag. Raises RegistryError.
    """
    registry, stage = registry_of(params, paths.root, sign=True), params.gate.stage
    if not reason.strip():
        raise RegistryError("a rollback needs a reason, which its tag keeps; give --reason")
    looked_at, holder, past = registry.last_event(), registry.stages().get(stage), registry.holders(stage)
    if holder is None:
        raise RegistryError(f"nothing is {stage}, so there is nothing to roll back; use `peftcore promote`")
    earlier = [one for one in past if one.version not in (None, holder.version)]
    found = next((one for one in reversed(earlier) if version in (None, one.version)), None)
    if found is None or found.version is None:
        there = ", ".join(dict.fromkeys(one.version for one in earlier if one.version)) or "none"
        never = f"no version was {stage} before" if version is None else f"{version} was never {stage} before"
        raise RegistryError(
            f"{never} {holder.version}, so it cannot be rolled back to; these were: {there}. "
            "`peftcore promote --version` judges any other"
        )
    chosen = registry.version(found.version)
    with files_of(paths, registry, chosen, [paths.adapter]) as where:
        check_adapter(where.adapter, registry, chosen)
    report = _report_of(found)
    lines = [
        f"{registry.name} {chosen.number} becomes {stage} again, in place of {holder.version or holder.commit}",
        "",
    ]
    lines += [f"Reason: {' '.join(reason.split())}", ""]
    lines += [] if report is None else [_REPORT + json.dumps(report.as_dict())]
    tag = registry.assign(stage, chosen, looked_at, "\n".join(lines).rstrip() + "\n", push_to)
    promotion = Promotion(registry.name, chosen.number, stage, "rolled back", tag, report)
    write_atomically(paths.promotion, json.dumps(promotion.as_dict(), indent=2) + "\n")
    return promotion


def last_version(registry: Registry, paths: Paths) -> Version:
    """The version that the last run registered; where it has been renumbered since, its record is written again."""
    record = last_record(paths)
    version = registry.version(record["version"])
    if version.content == record["adapter"]["content"]:
        return version
    # the number was given to another version (see `synchronise`)
    renumbered = registry.registered(record["adapter"]["content"], record["evidence"])
    if renumbered is None:
        raise RegistryError(
            f"{version.tag} is another version than the one that {paths.version.name} tells of, and that one is not "
            "registered; run `peftcore run` to register it"
        )
    write_atomically(paths.version, json.dumps(registry.record(renumbered), indent=2) + "\n")
    return renumbered


def last_record(paths: Paths) -> dict[str, Any]:
    """The record of the version that the last run registered. Raises StageError if there is none."""
    if not paths.version.exists():
        raise StageError(f"{paths.version} is missing: no version was registered yet; use `peftcore run`")
    return read_json(paths.version)


def read_promotion(paths: Paths, version: str) -> Promotion | None:
    """What became of the last promotion, if it was of this version; None otherwise."""
    if not paths.promotion.exists():
        return None
    value = read_json(paths.promotion)
    if value["version"] != version:
        return None
    report = GateReport.from_dict(value["report"]) if value["report"] else None
    return Promotion(**{**value, "report": report})


def _judge(
    params: Params,
    paths: Paths,
    registry: Registry,
    chosen: Version,
    holder: Assignment | None,
    from_run: bool,
    again: bool,
) -> GateReport:
    wanted = (paths.adapter, *(paths.root / name for name in registry.record(chosen)["evidence"]))
    with nullcontext(paths) if from_run else files_of(paths, registry, chosen, wanted) as where:
        candidate = _candidate(params, paths, registry, chosen, holder, where, again)
        champion = _champion(paths, registry, holder, candidate)
        if champion is not None and params.gate.champion.reevaluate:
            version, of = registry.version(champion.version), None if from_run else chosen
            measured = (params, paths, registry, version, candidate, of)
            champion = replace(
                champion,
                measure_again=partial(measure_again, *measured),
                measure_candidate=partial(measure_candidate, *measured),
            )
        return evaluate_gate(candidate, champion, params.gate, params.merge, params.project.seed)


def _decide(
    params: Params,
    registry: Registry,
    chosen: Version,
    report: GateReport,
    looked_at: int,
    dry_run: bool,
    push_to: str | None,
) -> Promotion:
    stage = params.gate.stage
    if not report.passed:
        return Promotion(registry.name, chosen.number, stage, "refused", None, report)
    if dry_run:
        return Promotion(registry.name, chosen.number, stage, "would promote", None, report)
    lines = [f"{registry.name} {chosen.number} becomes {stage}", ""]
    lines += [f"{check.name}: {check.detail}" for check in report.checks]
    lines += ["", _REPORT + json.dumps(report.as_dict())]
    tag = registry.assign(stage, chosen, looked_at, "\n".join(lines) + "\n", push_to)
    return Promotion(registry.name, chosen.number, stage, "promoted", tag, report)


def _candidate(
    params: Params,
    paths: Paths,
    registry: Registry,
    version: Version,
    holder: Assignment | None,
    at: Paths,
    again: bool,
) -> Candidate:
    allowed = allowed_signers(params.gate, paths.root)
    tag = registry.git.tags(version.tag)[0]
    control, record, metrics = at.evaluation_control, registry.record(version), read_json(at.evaluation_metrics)
    registered = {at.root / name: digest for name, digest in record["evidence"].items()}
    needed = {at.evaluation_metrics, at.evaluation_rows, at.merge_report, *([control] if control.exists() else [])}
    approved = approvals(registry, version, allowed)
    return Candidate(
        name=registry.name,
        version=version.number,
        adapter=at.adapter,
        files=record["adapter"]["files"],
        metrics=metrics,
        evidence=dict.fromkeys(sorted(needed)) | registered,
        record=record,
        unmeasured=tuple(unmeasured(record, metrics, params)),
        merge=read_json(at.merge_report),
        rows=_read_rows(at.evaluation_rows),
        control=_read_table(control, CONTROL) if control.exists() else None,
        content=version.content,
        signature=signature_of(registry.git, tag, allowed) if allowed else None,
        approved_by=tuple(one.who for one in approved),
        unsigned_approvals=0 if allowed is None else len(unsigned_approvals(registry, version, allowed)),
        taken_back=_taken_back(registry, version, params.gate.stage),
        again=again,
        looks=looks_of(registry, version, holder),
    )


def _taken_back(registry: Registry, version: Version, stage: str) -> str | None:
    """How the stage was taken back from this version's adapter, under this number or another; None: it was not."""
    contents = {one.number: one.content for one in registry.versions()}
    for number, how in registry.taken_back(stage).items():
        if number == version.number:
            return how
        if version.content is not None and contents.get(number) == version.content:
            return f"it has the adapter of {number}: {how}"
    return None


def _champion(paths: Paths, registry: Registry, holder: Assignment | None, candidate: Candidate) -> Champion | None:
    if holder is None:
        return None
    if holder.version is None:
        tag = f"{registry.name}#{holder.stage}#{holder.event}"
        raise RegistryError(
            f"{tag} is at commit {holder.commit[:10]}, which has no version (any more), so there is nothing to compare "
            f"with; `git tag --delete '{tag}'` takes the stage back to who held it before"
        )
    version = registry.version(holder.version)
    record = registry.record(version)
    with files_of(paths, registry, version, [paths.evaluation_rows]) as where:
        rows = _read_rows(where.evaluation_rows)
    base, manifest = record["base_model"], record.get("base_manifest")
    if manifest is None and not have_same_base(candidate.metrics, record):
        base, manifest = _base_of(paths, registry, version, record)
    return Champion(
        version.number,
        record["evaluation_set"],
        base,
        rows,
        loss_function=record["metrics"].get("loss_function"),
        base_manifest=manifest,
        content=version.content,
    )


def _base_of(paths: Paths, registry: Registry, version: Version, record: dict[str, Any]) -> tuple[str, str | None]:
    """(identity, manifest's digest) of the base of a version whose record is from before identities.

    They come from its files, because the same base saved by another release of transformers has another manifest.
    """
    manifest = record["base_model"]
    if paths.base.relative_to(paths.root).as_posix() not in record["dvc"]:
        return manifest, None
    with files_of(paths, registry, version, [paths.base]) as where:
        if sha256(where.base / MANIFEST) != manifest or damaged_files(where.base):
            raise RegistryError(
                f"artifacts/base of {version.tag} is not what was registered: DVC's cache or remote is damaged; remove "
                "the damaged file there and `dvc push` it again from a machine that has it"
            )
        return base_identity(where.base), manifest


def _read_rows(path: Path) -> pyarrow.Table:
    return _read_table(path, ("id", "tokens", "adapter_loss"), FOUNDED)


def _read_table(path: Path, columns: Sequence[str], if_there: Sequence[str] = ()) -> pyarrow.Table:
    try:
        there = set(if_there) & set(parquet.read_schema(path).names)
        return parquet.read_table(path, columns=sorted(there.union(columns)))
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} cannot be read ({error}); run `peftcore run` again") from error


def _report_of(holder: Assignment) -> GateReport | None:
    """The report that was written into the stage's own tag."""
    lines = [line for line in holder.message.splitlines() if line.startswith(_REPORT)]
    return GateReport.from_dict(json.loads(lines[-1].removeprefix(_REPORT))) if lines else None
