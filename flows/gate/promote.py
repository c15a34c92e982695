"""Promote a version: judge it by the gate against the champion, then give it the stage as a compare-and-swap.

A decision reads the registry once. All parts of the decision use this snapshot, and the compare-and-swap refers to it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from flows.gate.holdout_reuse import reuse_of
from flows.gate.judging import judge_answers
from flows.gate.reevaluation import reevaluate_benchmarks, reevaluate_candidate, reevaluate_champion, reevaluate_suites
from flows.gate.sequence import look_of
from flows.params import EventType, Params
from flows.params.gate import RANKING
from flows.paths import Paths
from flows.registry.approvals import approvals, unsigned_approvals
from flows.registry.lineage import read_json
from flows.registry.project_registry import registry_of
from flows.registry.reader import Assignment, RegistryReader, Version
from flows.registry.registered_files import check_adapter, files_of
from flows.registry.registry import Registry
from flows.registry.signatures import allowed_signers, signature_of
from flows.registry.synchronise import synchronise
from flows.runtime.tracking import mirror_judgement, mirror_promotion
from flows.webhooks import Event, TagProof, announce, announced, try_to_deliver
from peftcore.files import MANIFEST, damaged_files, sha256, write_atomically

PromotionOutcome = Literal["promoted", "already", "refused", "would promote", "rolled back"]
_REPORT = "Gate report: "
OPTIONAL_COLUMNS = (
    *("slice", "weight", "base_loss", "label", "entities"),
    *(
        f"{side}_{name}"
        for side in ("base", "adapter")
        for name in (
            *("rouge_l", "ended", "margin", "prediction", "accuracy", "divergence", "entities", "correct"),
            *RANKING,
        )
    ),
)
"""Columns of the evaluation's rows that some objectives have."""
CONTROL_COLUMNS = ("tokens", "base_loss", "adapter_loss")
"""Columns of the control set's losses."""


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion or a rollback. report: None if the stage was given by hand, without the gate."""

    name: str
    version: str
    stage: str
    outcome: PromotionOutcome
    tag: str | None
    report: GateReport | None

    @property
    def accepted(self) -> bool:
        """True unless the gate refused."""
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
        """Return the result as values that JSON can hold."""
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

    The result is written to reports/promotion.json for the review page.

    Args:
        params: the rules to judge by.
        paths: the repository.
        version: the version's number; None is the version of the last run.
        dry_run: judge only.
        push_to: a git remote that has to accept the promotion; it also gets the tag of a refused version.
        again: judge the version even if it lost the stage, for example by a rollback.

    Raises:
        RegistryConflict: another writer was faster; judge the version again.
        RegistryError: the version or its files cannot be used.
        StageError: no version was registered, or a re-evaluation failed.
    """
    registry = registry_of(params, paths.root, sign=True)
    if push_to is not None:
        version = synchronise(registry, push_to).get(version or "", version)
    # read before anything is compared: a promotion by another writer after this makes our tag impossible
    state = registry.snapshot()
    target = state.version(version) if version else last_version(state, paths)
    holder = state.stages().get(params.gate.stage)
    if holder is not None and holder.version == target.number:
        if push_to is not None and not dry_run:
            registry.push_again(push_to, target, holder)
            try_to_deliver(params, paths.root)  # the promotion of a process that was killed before its push
        promotion = Promotion(registry.name, target.number, params.gate.stage, "already", None, _report_of(holder))
    else:
        report = _judge(params, paths, state, target, holder, version is None, again)
        promotion = _decide(params, registry, target, report, state, dry_run, push_to)
        _mirror_judge(params, paths, state.record(target), report, dry_run)
    if not dry_run:
        write_atomically(paths.promotion, json.dumps(promotion.as_dict(), indent=2) + "\n")
    return promotion


def roll_back(
    params: Params, paths: Paths, reason: str, version: str | None = None, push_to: str | None = None
) -> Promotion:
    """Give the stage back to a version that had it before, without the gate.

    The version's files have to be the registered ones. The tag keeps the author, the reason, the replaced version, and
    the gate's report from the version's own promotion. If an earlier call with the same reason was killed after it had
    made its tag, this call completes that rollback.

    Args:
        params: the parameters; `gate.stage` is the stage.
        paths: the repository.
        reason: the reason, which the tag keeps.
        version: the version's number; None is the last earlier holder that did not lose the stage by a rollback or a
            withdrawal.
        push_to: a git remote that has to accept the rollback.

    Raises:
        RegistryError: no such version had the stage, or its files are damaged.
        RegistryConflict: another writer was faster.
    """
    registry, stage = registry_of(params, paths.root, sign=True), params.gate.stage
    if not reason.strip():
        raise RegistryError("a rollback needs a reason, which its tag keeps; give --reason")
    state = registry.snapshot()
    holder = state.stages().get(stage)
    if holder is None:
        raise RegistryError(f"nothing is {stage}, so there is nothing to roll back; use `peftcore promote`")
    if _is_interrupted_rollback(registry, paths, holder, reason, version):
        return _completed_rollback(params, paths, registry, state, holder, push_to)
    earlier = [one for one in state.holders(stage) if one.version not in (None, holder.version)]
    # two rollbacks in a row go back twice, and not back to the version that was rolled back first
    passed_over = state.withdrawn(stage).keys() if version is None else ()
    fitting = [one for one in earlier if version in (None, one.version) and one.version not in passed_over]
    target = fitting[-1] if fitting else None
    if target is None or target.version is None:
        earlier_holders = ", ".join(dict.fromkeys(one.version for one in earlier if one.version)) or "none"
        if version is None and earlier:
            raise RegistryError(
                f"each version that was {stage} before {holder.version} lost the stage by a rollback or a withdrawal: "
                f"{earlier_holders}; `peftcore rollback --to VERSION` gives it to one of them again"
            )
        never = f"no version was {stage} before" if version is None else f"{version} was never {stage} before"
        raise RegistryError(
            f"{never} {holder.version}, so it cannot be rolled back to; these were: {earlier_holders}. "
            "`peftcore promote --version` judges any other version"
        )
    chosen = state.version(target.version)
    with files_of(paths, state, chosen, [paths.adapter]) as where:
        check_adapter(where.adapter, state, chosen)
    report = _report_of(target)
    lines = [
        f"{registry.name} {chosen.number} becomes {stage} again, in place of {holder.version or holder.commit}",
        "",
    ]
    lines += [_reason_line(reason), ""]
    lines += [] if report is None else [_REPORT + json.dumps(report.as_dict())]
    tag = registry.assignment_tag(stage, state.last_event() + 1)
    promotion = Promotion(registry.name, chosen.number, stage, "rolled back", tag, report)
    event = _event("rollback", promotion, holder.version, [tag, chosen.commit], reason=reason)
    with announced(params, paths.root, event, TagProof(tag, lines[0], push_to)):
        registry.assign(stage, chosen, state.last_event(), "\n".join(lines).rstrip() + "\n", push_to)
    _mirror(params, paths.root, state, chosen)
    write_atomically(paths.promotion, json.dumps(promotion.as_dict(), indent=2) + "\n")
    return promotion


def _is_interrupted_rollback(
    registry: Registry, paths: Paths, holder: Assignment, reason: str, version: str | None
) -> bool:
    """Return True if the holder comes from a rollback for the same reason of which no outcome was written here."""
    if holder.version is None or version not in (None, holder.version):
        return False
    outcome = read_promotion(paths, holder.version)
    is_known = outcome is not None and outcome.tag == registry.assignment_tag(holder.stage, holder.event)
    return not is_known and _reason_line(reason) in holder.message.splitlines()


def _completed_rollback(
    params: Params, paths: Paths, registry: Registry, state: RegistryReader, holder: Assignment, push_to: str | None
) -> Promotion:
    assert holder.version is not None
    version, tag = state.version(holder.version), registry.assignment_tag(holder.stage, holder.event)
    if push_to is not None:
        registry.push_again(push_to, version, holder)
    try_to_deliver(params, paths.root)
    _mirror(params, paths.root, state, version)
    promotion = Promotion(registry.name, version.number, holder.stage, "rolled back", tag, _report_of(holder))
    write_atomically(paths.promotion, json.dumps(promotion.as_dict(), indent=2) + "\n")
    return promotion


def _reason_line(reason: str) -> str:
    """Return the line of a rollback's tag that keeps the reason."""
    return f"Reason: {' '.join(reason.split())}"


def last_version(registry: RegistryReader, paths: Paths) -> Version:
    """Return the version that the last run registered; if it was renumbered since, its local record is updated."""
    record = last_record(paths)
    version = registry.version(record["version"])
    if version.content == record["adapter"]["content"]:
        return version
    # the number was given to another version (see `synchronise`)
    renumbered = registry.registered(record["adapter"]["content"], record["evidence"])
    if renumbered is None:
        raise RegistryError(
            f"{version.tag} is not the version in {paths.version.name}, and the version in {paths.version.name} is not "
            "registered; run `peftcore run` to register it"
        )
    write_atomically(paths.version, json.dumps(registry.record(renumbered), indent=2) + "\n")
    return renumbered


def last_record(paths: Paths) -> dict[str, Any]:
    """Return the record of the version that the last run registered. Raises StageError if there is none."""
    if not paths.version.exists():
        raise StageError(f"{paths.version} is missing: no version was registered yet; use `peftcore run`")
    return read_json(paths.version)


def read_promotion(paths: Paths, version: str) -> Promotion | None:
    """Return the result of the last promotion if it was of this version; None otherwise."""
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
    state: RegistryReader,
    chosen: Version,
    holder: Assignment | None,
    from_run: bool,
    again: bool,
) -> GateReport:
    """Return the gate's report on a version. from_run: read the files of the last run, not the registered ones."""
    wanted = (paths.adapter, *(paths.root / name for name in state.record(chosen)["evidence"]))
    with nullcontext(paths) if from_run else files_of(paths, state, chosen, wanted) as where:
        candidate = _candidate(params, paths, state, chosen, holder, where, again)
        champion = _champion(params, paths, state, holder, candidate)
        taken_from = None if from_run else chosen
        if champion is not None and params.gate.judge.is_on:
            judge = partial(judge_answers, params, paths, state, candidate, taken_from)
            champion = replace(champion, judge_answers=judge)
        if champion is not None and params.gate.champion.reevaluate:
            version = state.version(champion.version)
            arguments = (params, paths, state, version, candidate, taken_from)
            champion = replace(
                champion,
                reevaluate_champion=partial(reevaluate_champion, *arguments),
                reevaluate_candidate=partial(reevaluate_candidate, *arguments),
                reevaluate_suites=partial(reevaluate_suites, params, paths, state, version, candidate),
                reevaluate_benchmarks=partial(reevaluate_benchmarks, params, paths, state, version, candidate),
            )
        return evaluate_gate(candidate, champion, params.gate, params.merge, params.project.seed)


def _decide(
    params: Params,
    registry: Registry,
    chosen: Version,
    report: GateReport,
    state: RegistryReader,
    dry_run: bool,
    push_to: str | None,
) -> Promotion:
    """Assign the stage if the report passed. state: the snapshot that the report is about, for the compare-and-swap."""
    stage, root, last_event = params.gate.stage, registry.git.root, state.last_event()
    holder = state.stages().get(stage)
    previous = None if holder is None else holder.version
    if not report.passed:
        promotion = Promotion(registry.name, chosen.number, stage, "refused", None, report)
        if not dry_run:
            key = [chosen.number, chosen.commit, stage, last_event, report.reason]
            announce(params, root, _event("refusal", promotion, previous, key))
            if push_to is not None:
                registry.push_version(push_to, chosen)  # other people look at it, and approve it
        return promotion
    if dry_run:
        return Promotion(registry.name, chosen.number, stage, "would promote", None, report)
    lines = [f"{registry.name} {chosen.number} becomes {stage}", ""]
    lines += [f"{check.name}: {check.detail}" for check in report.checks]
    lines += ["", _REPORT + json.dumps(report.as_dict())]
    tag = registry.assignment_tag(stage, last_event + 1)
    promotion = Promotion(registry.name, chosen.number, stage, "promoted", tag, report)
    event = _event("promotion", promotion, previous, [tag, chosen.commit])
    with announced(params, root, event, TagProof(tag, lines[0], push_to)):
        registry.assign(stage, chosen, last_event, "\n".join(lines) + "\n", push_to)
    _mirror(params, root, state, chosen)
    return promotion


def _mirror(params: Params, root: Path, state: RegistryReader, version: Version) -> None:
    """Mirror to the tracking backends that a version has the stage now."""

    @contextmanager
    def adapter() -> Iterator[Path]:
        paths = Paths(root)
        with files_of(paths, state, version, [paths.adapter]) as where:
            yield where.adapter

    mirror_promotion(params, root, state.record(version), adapter)


def _mirror_judge(params: Params, paths: Paths, record: dict[str, Any], report: GateReport, dry_run: bool) -> None:
    """Mirror the judge's figures to the tracking backends, if there are any."""
    figures = next((check.figures for check in report.checks if check.name == "judge"), None)
    if figures is not None and not dry_run:
        mirror_judgement(params, paths, record, figures)


def _event(kind: EventType, promotion: Promotion, previous: str | None, key: list[Any], **further: Any) -> Event:
    """Return the webhook's event of a verdict. previous: the stage's holder before; key: see `Event`."""
    data = {**promotion.as_dict(), "summary": promotion.sentence, "previous": previous, **further}
    return Event(kind, promotion.name, json.dumps(key), data)


def _candidate(
    params: Params,
    paths: Paths,
    state: RegistryReader,
    version: Version,
    holder: Assignment | None,
    at: Paths,
    again: bool,
) -> Candidate:
    """Return the facts about a version, from its record and from its files at `at`."""
    allowed = allowed_signers(params.gate, paths.root)
    tag = state.tags(version.tag)[0]
    control, record, metrics = at.evaluation_control, state.record(version), read_json(at.evaluation_metrics)
    registered = {at.root / name: digest for name, digest in record["evidence"].items()}
    optional = {path for path in (control, at.evaluation_suites) if path.exists()}
    needed = {at.evaluation_metrics, at.evaluation_rows, at.merge_report, *optional}
    approved = approvals(state, version, allowed)
    return Candidate(
        name=state.name,
        version=version.number,
        adapter=at.adapter,
        files=record["adapter"]["files"],
        metrics=metrics,
        evidence=dict.fromkeys(sorted(needed)) | registered,
        record=record,
        unmeasured=tuple(unmeasured(record, metrics, params, paths.root)),
        merge=read_json(at.merge_report),
        rows=_read_rows(params, at.evaluation_rows, metrics.get("scorers") or ()),
        control=_read_table(control, CONTROL_COLUMNS) if control.exists() else None,
        content=version.content,
        signature=signature_of(state.git, tag, allowed) if allowed else None,
        approved_by=tuple(one.who for one in approved),
        unsigned_approvals=0 if allowed is None else len(unsigned_approvals(state, version, allowed)),
        withdrawn=_withdrawn(state, version, params.gate.stage),
        again=again,
        reuse=reuse_of(state, version, holder),
        look=look_of(state, version, params.gate),
        suites=read_json(at.evaluation_suites) if at.evaluation_suites.exists() else {},
        required_benchmarks=tuple(benchmark.name for benchmark in params.evaluate.benchmarks),
        required_suites=tuple(Path(name).stem for name in params.evaluate.suites),
    )


def _withdrawn(state: RegistryReader, version: Version, stage: str) -> str | None:
    """Return how this version's adapter lost the stage, under this number or another; None if it did not."""
    contents = {one.number: one.content for one in state.versions()}
    for number, how in state.withdrawn(stage).items():
        if number == version.number:
            return how
        if version.content is not None and contents.get(number) == version.content:
            return f"it has the adapter of {number}: {how}"
    return None


def _champion(
    params: Params, paths: Paths, state: RegistryReader, holder: Assignment | None, candidate: Candidate
) -> Champion | None:
    """Return the facts about the stage's holder; None if the stage is free."""
    if holder is None:
        return None
    if holder.version is None:
        tag = f"{state.name}#{holder.stage}#{holder.event}"
        raise RegistryError(
            f"{tag} is at commit {holder.commit[:10]}, which has no version (any more), so there is nothing to compare "
            f"with; `git tag --delete '{tag}'` gives the stage back to its earlier holder"
        )
    version = state.version(holder.version)
    record = state.record(version)
    scorers = record["metrics"].get("scorers") or {}
    files = [paths.evaluation_rows, *([paths.evaluation_suites] if record["metrics"].get("suites") else [])]
    with files_of(paths, state, version, files) as where:
        rows = _read_rows(params, where.evaluation_rows, scorers)
        suites = read_json(where.evaluation_suites) if paths.evaluation_suites in files else {}
    base, manifest = record["base_model"], record.get("base_manifest")
    if manifest is None and not have_same_base(candidate.metrics, record):
        base, manifest = _base_of(paths, state, version, record)
    return Champion(
        version.number,
        record["evaluation_set"],
        base,
        rows,
        loss_function=record["metrics"].get("loss_function"),
        base_manifest=manifest,
        content=version.content,
        scorers=scorers,
        max_new_tokens=record["params"].get("evaluate", {}).get("max_new_tokens"),
        suites=suites,
        benchmarks=record["metrics"].get("benchmarks") or {},
    )


def _base_of(paths: Paths, state: RegistryReader, version: Version, record: dict[str, Any]) -> tuple[str, str | None]:
    """Return (identity, manifest's digest) of the base of a version whose record has no identity.

    The identity comes from the base's files: different releases of transformers save one base with different manifests.
    """
    manifest = record["base_model"]
    if paths.base.relative_to(paths.root).as_posix() not in record["dvc"]:
        return manifest, None
    with files_of(paths, state, version, [paths.base]) as where:
        if sha256(where.base / MANIFEST) != manifest or damaged_files(where.base):
            raise RegistryError(
                f"artifacts/base of {version.tag} differs from the registered base: DVC's cache or remote is damaged; "
                "remove the damaged file there and `dvc push` it again from a machine that has it"
            )
        return base_identity(where.base), manifest


def _read_rows(params: Params, path: Path, scorers: Iterable[str]) -> pyarrow.Table:
    further = [f"{side}_{name}" for name in scorers for side in ("base", "adapter")]
    further += ["adapter_answer", "reference"] if params.gate.judge.is_on else []
    return _read_table(path, ("id", "tokens", "adapter_loss"), (*OPTIONAL_COLUMNS, *further))


def _read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pyarrow.Table:
    try:
        present = set(optional) & set(parquet.read_schema(path).names)
        return parquet.read_table(path, columns=sorted(present.union(columns)))
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise StageError(f"{path} cannot be read ({error}); run `peftcore run` again") from error


def _report_of(holder: Assignment) -> GateReport | None:
    """Return the gate's report from the message of the stage's tag."""
    lines = [line for line in holder.message.splitlines() if line.startswith(_REPORT)]
    return GateReport.from_dict(json.loads(lines[-1].removeprefix(_REPORT))) if lines else None
