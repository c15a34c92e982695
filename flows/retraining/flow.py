"""The Prefect flow of a retraining: new data, the stages in a working tree of their own, the gate, and a report.

    collect -> fetch -> drift -> prepare ... register -> promote or keep -> report

A retraining trains only if there are new files; otherwise it ends within seconds. Like the pipeline's flow it also runs
without Prefect's server, and imports no torch.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment
from ruamel.yaml import YAML

from flows.base.identity import is_base
from flows.errors import ParamsError, PipelineError, RegistryConflict
from flows.gate.promote import Promotion, last_record, last_version, promote
from flows.gate.reevaluation import measured_with
from flows.params import Params, left_over, load_params
from flows.params.train import WITH_CLASSES
from flows.paths import Paths
from flows.pipeline.run import is_without_server
from flows.registry.lineage import LOCK, check_artifact_name, headline_metrics
from flows.registry.project_registry import registry_of
from flows.registry.reader import Version
from flows.registry.synchronise import synchronise
from flows.retraining.committed import head_params, last_readable_params
from flows.retraining.data import Collected, Files, Source, champion_of, has_been_tried, note_tried, versions_before
from flows.retraining.drift import DriftReport, Known, measure_drift, spread_of
from flows.retraining.history import Entry, append, entries
from flows.retraining.notice import notify
from flows.retraining.page import write_history_page
from flows.retraining.tree import (
    forget_unfinished,
    is_unfinished,
    note_unfinished,
    only_one,
    remove_working_tree,
    unfinished_since,
    working_tree,
)
from flows.retraining.trust import exclude, read_excluded, read_trusted
from flows.review.page import write_review
from flows.runtime import logs
from flows.runtime.git import Git
from flows.runtime.inputs import unused_changes
from flows.runtime.prefect_server import tied_temporary_server
from flows.runtime.project import changed_stages, files_at, find_root, stage_order
from flows.runtime.stage_process import forked_stages, run_stage
from flows.webhooks import Event, try_to_announce, try_to_deliver
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)

TRIES = 3
"""Attempts while other writers register or promote at the same time."""
OWN_PARAMS = (
    ("data", "source"),
    ("data", "new_files"),
    ("data", "replay_share"),
    ("data", "quarantined"),
    ("train", "start_from"),
)
"""Parameters that a retraining sets itself; data.source only for a hub's source, to which it adds the revision."""

Work = Callable[..., Any]
Runner = Callable[[str, Work, int, float], Work]
"""A function of (name, work, number of retries, seconds before a retry) that returns `work` with these retries."""


def run_retraining(root: Path, push_to: str | None = None, force: bool = False) -> Entry:
    """Run `retrain`; without Prefect's server, or if it goes away, run the same work without Prefect."""
    Git(root)  # without a commit there is nothing to train on; before the server, whose start takes a while
    try:
        with tied_temporary_server():
            return retrain(str(root), push_to, force)
    except (RuntimeError, httpx.TransportError) as error:
        if not is_without_server(error):
            raise
        logger.warning("Prefect's server cannot be reached (%s); continuing without it", error)
    return _retrain(root, push_to, force, _with_retries)


@flow(name="retrain", validate_parameters=False)
def retrain(root: str = ".", push_to: str | None = None, force: bool = False) -> Entry:
    """Train on new data, judge the candidate, promote it or keep the champion, and add an entry to the history.

    Args:
        root: the repository, or a folder in it.
        push_to: the git remote whose tags are authoritative for all clones.
        force: train even if there are no new files.

    Raises:
        BusyError: another retraining runs.
        PipelineError: the retraining failed; the history has the reason.
    """
    # a deployment gives an empty text if its variable is not set
    work = partial(_retrain, find_root(Path(root)), push_to or None, force, _task)
    return _logged(work) if deployment.id else work()


def _logged(work: Callable[[], Entry]) -> Entry:
    """Log the outcome of a retraining that a schedule started: Prefect's own log is silent."""
    logs.set_up()
    try:
        entry = work()
    except Exception as error:
        logger.error("retraining failed: %s", error)
        raise
    logger.info("retraining %s: %s", entry.outcome, entry.reason)
    return entry


def _task(name: str, work: Work, retries: int, delay: float) -> Work:
    return Task(work, name=name, task_run_name=name, cache_policy=NO_CACHE, retries=retries, retry_delay_seconds=delay)


def _with_retries(_: str, work: Work, retries: int, delay: float) -> Work:
    def trying(*arguments: Any) -> Any:
        for _ in range(retries):
            try:
                return work(*arguments)
            except PipelineError as error:
                logger.warning("%s; trying again in %g seconds", error, delay)
                time.sleep(delay)
        return work(*arguments)

    return trying


def _retrain(root: Path, push_to: str | None, force: bool, runner: Runner) -> Entry:
    paths, git = Paths(root), Git(root)
    if unused := unused_changes(git):
        logger.warning("a retraining uses committed files only, without %s", unused)
    with only_one(root):
        entry, earlier = Entry(started=_now()), entries(paths)
        last_skipped = [last.skipped for last in earlier[-1:]]
        _announce_killed(git, root, {one.started for one in earlier})
        try:
            Retraining(root, push_to, force, runner, entry).work()
        except BaseException as error:  # the history has interruptions too
            entry.outcome, entry.reason = "failed", str(error) or type(error).__name__
            raise
        finally:
            entry.finished = _now()
            try:
                # before the entry: if the process is killed in between, the next retraining announces the same event
                params = last_readable_params(git)
                if params is not None and entry.outcome == "failed":
                    _announce_failure(params, root, entry.started, entry.reason)
            finally:
                append(paths, entry)
            if params is not None:
                write_history_page(params, paths)
                # an unchanged run notifies only if it skipped other files than the run before
                if entry.outcome != "unchanged" or (entry.skipped and [entry.skipped] != last_skipped):
                    notify(params.retrain.notify, *_message(params, entry, paths.retraining_page))
                try_to_deliver(params, root)
    return entry


class Retraining:
    """One running retraining; its steps fill in `entry`."""

    def __init__(self, root: Path, push_to: str | None, force: bool, runner: Runner, entry: Entry) -> None:
        """Prepare the working tree; the arguments are those of `retrain`."""
        self.paths, self.push_to, self.force = Paths(root), push_to, force
        self.runner, self.entry = runner, entry
        self.params = head_params(Git(root))
        self.registry = registry_of(self.params, root, sign=True)
        self.unfinished = is_unfinished(root)
        self.tree = Paths(working_tree(root))
        # an interrupted retraining has changed the parameters and removed files of rows that may be trusted since
        everything = (".", f":(exclude){LOCK}")  # the lock has the stages that the interrupted retraining has run
        Git(self.tree.root).run_without_hooks("checkout", "--quiet", Git(root).head(), "--", *everything)
        check_artifact_name(self.tree.root, self.params.project.name)
        for warning in left_over(self.params):
            logger.warning("%s", warning)
        self.always_quarantined = self.params.data.quarantined or []
        self.source = Source(self.params, root, self.tree.root)

    def work(self) -> None:
        """Run all steps, from new data to a verdict."""
        if self.push_to is not None:
            self._run("fetch tags", self._fetch_tags, self.push_to)
        if self.unfinished and self._has_promoted():
            self._end_interrupted()
        entry, champion = self.entry, champion_of(self.registry, self.params.gate.stage)
        entry.champion = champion.number if champion else None
        collected: Collected = self._run("collect", self._collect, champion)
        entry.files, entry.new_files = len(collected.files), collected.new_files
        entry.skipped = collected.skipped
        for name in collected.waiting:
            logger.warning("%s waits until somebody trusts it: peftcore retrain --trust %s", name, name)
        for name, why in collected.skipped.items():
            logger.warning("retrain.incoming: %s is skipped: %s", name, why)
        reasons = self._reasons(collected)
        if not reasons:
            entry.outcome, entry.reason = "unchanged", f"none of {len(collected.files)} files is new"
            remove_working_tree(self.paths.root)
            return
        logger.info("training: %s", "; ".join(reasons))
        note_unfinished(self.paths.root, entry.started)
        self._set_up(collected, champion)
        with forked_stages(self.tree.root):
            self._stages(collected, champion)
        if self.push_to is not None:
            self._run("take a number", self._take_number, self.push_to)
        promotion: Promotion = self._run("promote", self._promote)
        entry.version, entry.promotion = promotion.version, promotion.as_dict()
        entry.outcome = "promoted" if promotion.outcome == "promoted" else "kept"
        entry.reason = promotion.sentence
        entry.metrics = headline_metrics(self.tree)
        note_tried(self.paths, collected.files, promotion.version)
        if not promotion.accepted:
            self._exclude_doubtful(collected, promotion)
        self._run("report", self._report)
        remove_working_tree(self.paths.root)

    def _exclude_doubtful(self, collected: Collected, promotion: Promotion) -> None:
        """Exclude the quarantined files that nobody trusts, or whose drift is suspicious, after a refusal."""
        # drift is measured on files that are new to the champion, so the champion's own files are never excluded
        untrusted = [name for name in collected.new_to_champion if self.params.retrain.is_untrusted(name)]
        doubts = dict.fromkeys(untrusted, "nobody has trusted it") | (self.entry.drift or {}).get("suspicious", {})
        self.entry.excluded = [name for name in self.entry.quarantined if name in doubts]
        for name in self.entry.excluded:
            why = f"{promotion.version} was refused; {doubts[name]}"
            exclude(self.paths, {name: collected.files[name]}, why)

    def _has_promoted(self) -> bool:
        """Return True if the candidate of the interrupted retraining has the stage."""
        champion = champion_of(self.registry, self.params.gate.stage)
        if champion is None or not self.tree.version.exists():
            return False
        record = last_record(self.tree)
        return (record["version"], record["adapter"]["content"]) == (champion.number, champion.content)

    def _end_interrupted(self) -> None:
        """End a retraining that was interrupted after its promotion; otherwise it would train its own candidate."""
        if self.push_to is not None:
            self._run("promote", self._promote)  # pushes the promotion if the interrupted process did not
        forget_unfinished(self.paths.root)
        self.tree.version.unlink()
        self.unfinished = False

    def _fetch_tags(self, remote: str) -> None:
        """Take in the tags of a git remote."""
        synchronise(self.registry, remote)

    def _take_number(self, remote: str) -> None:
        """Push the candidate's tag, which reserves its number; if the number is taken, use the next one.

        Raises RegistryConflict if other writers are faster at each attempt.
        """
        for _ in range(TRIES):
            synchronise(self.registry, remote)
            try:
                self.registry.push_version(remote, last_version(self.registry, self.tree))
                return
            except RegistryConflict as error:
                logger.warning("%s", error)
        raise RegistryConflict(f"conflict: other writers registered a version {TRIES} times meanwhile; run this again")

    def _promote(self) -> Promotion:
        """Judge the candidate; judge it again if the stage got another holder meanwhile. Raises RegistryConflict."""
        for _ in range(TRIES - 1):
            try:
                return promote(self.params, self.tree, None, False, self.push_to)
            except RegistryConflict as error:
                logger.warning("%s; judging the candidate again", error)
                if self.push_to is not None:
                    self._fetch_tags(self.push_to)
        return promote(self.params, self.tree, None, False, self.push_to)

    def _run(self, name: str, work: Work, *arguments: Any, retries: int = 0) -> Any:
        started = time.monotonic()
        try:
            return self.runner(name, work, retries, self.params.retrain.retry_delay)(*arguments)
        finally:
            self.entry.seconds[name] = time.monotonic() - started

    def _collect(self, champion: Version | None) -> Collected:
        state = self.registry.snapshot()
        # `peftcore run` registers versions without a list of files, whose commits hold no incoming data
        listed = next((one for one in reversed(state.versions()) if self.source.listed_files(one)), None)
        before = [*([listed] if listed else []), *versions_before(state, self.params.gate.stage)]
        return self.source.collect(before, champion, read_excluded(self.paths), read_trusted(self.paths))

    def _reasons(self, collected: Collected) -> list[str]:
        """Return the reasons to train, in words; empty if there are none.

        Files are a reason if their set has never been trained on and was not tried before. With `retrain.on: any` and
        no other reason, changed parameters and code are reasons, too.
        """
        before = versions_before(self.registry.snapshot(), self.params.gate.stage)
        reasons = ["--force was given"] if self.force else []
        if self.unfinished:
            reasons.append("the last retraining came to no verdict")
        is_known = not collected.new_files and self._is_known(collected.files, before)
        if not is_known and not has_been_tried(self.paths, collected.files):
            new = f"new files: {len(collected.new_files)} of {len(collected.files)}"
            reasons.append(new if collected.new_files else "files were removed")
        if self.params.retrain.on == "any" and before and not reasons:
            reasons += self._other_changes(before[0])
        return reasons

    def _is_known(self, files: Files, before: list[Version]) -> bool:
        """Return True if a retraining's version, promoted or refused, or one of `before` was trained on these files."""
        listed = (self.source.listed_files(version) for version in reversed(self.registry.versions()))
        return files in listed or any(self.source.files_of(version) == files for version in before)

    def _other_changes(self, newest: Version) -> list[str]:
        """Return the parameters and code that differ from the newest version's dvc.lock, in DVC's words.

        DVC compares that lock with the working tree. Differences in OWN_PARAMS do not count, so params.yaml gets their
        recorded values meanwhile. Outputs and files of rows do not count either; `_reasons` compares the rows.
        """
        lock = self.registry.git.show(newest.commit, LOCK)
        write_atomically(self.tree.root / LOCK, lock)
        recorded = YAML(typ="safe").load(lock)["stages"]
        outs = [out["path"] for stage in recorded.values() for out in stage.get("outs", [])]
        committed = self.tree.params.read_bytes()
        _set_own_params(
            self.tree.params, [stage.get("params", {}).get("params.yaml", {}) for stage in recorded.values()]
        )
        try:
            changes = changed_stages(self.tree.root, list(recorded))
        finally:
            write_atomically(self.tree.params, committed)
        words = {word for words in changes.values() for word in words}
        return sorted(word for word in words if not (any(out in word for out in outs) or self._is_of_the_rows(word)))

    def _is_of_the_rows(self, word: str) -> bool:
        """Return True if a change in DVC's words, such as `modified data/rows`, is a change of the data source."""
        path = word.partition(" ")[2]
        return self.source.is_path and f"{self.source.name}/".startswith(f"{path}/")

    def _set_up(self, collected: Collected, champion: Version | None) -> None:
        """Commit the data, and set the start and the files of the training in the tree's params.yaml."""
        retraining = self.params.retrain
        if retraining.start == "champion" and self.params.data.assignment != "hashed":
            raise ParamsError(
                "retrain.start is champion and data.assignment is filled: as data grow, the champion's training rows "
                "could become test rows; give data.assignment: hashed, or retrain.start: scratch"
            )
        if self.params.data.assignment == "filled":
            logger.warning("data.assignment is filled: growing data can move rows between splits; hashed never does")
        self.source.commit(collected)
        if (pinned := self.source.pinned(collected.files)) is not None:
            self._change({"data": {"source": pinned}})
        if retraining.start == "champion" and champion is not None:
            self.entry.start = champion.number
            new_files = collected.new_to_champion if 0 < len(collected.new_to_champion) < len(collected.files) else None
            data = {"new_files": new_files, "replay_share": retraining.replay_share}
            self._change({"train": {"start_from": champion.number}, "data": data})
        self._quarantine(collected.quarantined, collected)

    def _change(self, changes: dict[str, dict[str, Any]]) -> None:
        """Set parameters in the tree's params.yaml."""
        with _edited(self.tree.params) as values:
            for section, keys in changes.items():
                values.setdefault(section, {}).update(keys)
        self.params = load_params(self.tree.params)

    def _stages(self, collected: Collected, champion: Version | None) -> None:
        """Run every stage. Drift is measured after the fetch stage, because it needs the base."""
        stages = stage_order(self.tree.root)
        for done, stage in enumerate(stages):
            arguments = (self.tree.root, stage, self.params.retrain.stage_timeout, False, f"{done}/{len(stages)}")
            self._run(stage, run_stage, *arguments, retries=self.params.retrain.retries)
            if stage == "fetch" and champion is not None and collected.new_to_champion and self.source.is_path:
                drift = self._run("drift", self._drift, collected, champion)
                self.entry.drift = drift.as_dict()
                self._quarantine_drifted(drift, collected)
                if drift.suspicious:
                    self._announce_drift(drift, collected, champion)

    def _announce_drift(self, drift: DriftReport, collected: Collected, champion: Version) -> None:
        """Announce the files beyond a drift limit. A retraining that is continued announces nothing new."""
        name = self.params.project.name
        data = {
            "champion": champion.number,
            "files": drift.suspicious,
            "quarantined": self.entry.quarantined,
            "summary": f"{name}: {len(drift.suspicious)} new files differ from the rows of {champion.number}",
        }
        digests = sorted(collected.files[file] for file in drift.suspicious)
        event = Event("drift", name, " ".join([champion.number, *digests]), data)
        try_to_announce(self.params, self.paths.root, event)

    def _quarantine_drifted(self, drift: DriftReport, collected: Collected) -> None:
        """Quarantine new files that exceed a drift limit or are too small to judge, except for trusted files.

        A candidate that has learned wrong rows is better at wrong rows, so an evaluation on them would promote it.
        """
        trusted = read_trusted(self.paths)
        reasons = drift.unsure | drift.suspicious
        untrusted = sorted(name for name in reasons if collected.files[name] not in trusted)
        for name in untrusted:
            logger.warning("%s: %s", name, reasons[name])
        self._quarantine(untrusted, collected)

    def _quarantine(self, names: list[str], collected: Collected) -> None:
        """Keep these files out of evaluation; files quarantined earlier also stay out.

        The committed `data.quarantined` stays, without files that are left out: the prepare stage refuses their names.
        """
        quarantined = sorted({*self.entry.quarantined, *names})
        if len(quarantined) == len(collected.files):
            logger.warning("all files are quarantined, so there are no others to evaluate on: they are evaluated on")
            quarantined = [name for name in collected.quarantined if self.params.retrain.is_untrusted(name)]
        self.entry.quarantined = quarantined
        listed = sorted({*self.always_quarantined, *quarantined} - {*collected.excluded, *collected.waiting})
        if listed != sorted(self.params.data.quarantined or []):
            self._change({"data": {"quarantined": listed or None}})

    def _drift(self, collected: Collected, champion: Version) -> DriftReport:
        record = self.registry.record(champion)
        loss, is_of_this_base = record["metrics"]["adapter"]["loss"], is_base(self.tree.base, record)
        champion_params = measured_with(self.params, self.registry, champion)
        files = [self.tree.adapter] + (
            [self.tree.labels] if champion_params["train"]["objective"] in WITH_CLASSES else []
        )
        if record.get("calibrated_base") is not None:
            files.append(self.tree.calibrated)
        names = [path.relative_to(self.tree.root).as_posix() for path in (*files, self.tree.evaluation_rows)]
        with files_at(self.paths.root, champion.commit, names) as at:
            spread = spread_of(at / names[-1])
            known = Known(champion.number, loss, spread, at if is_of_this_base else None, champion_params)
            return measure_drift(self.tree.root, collected.new_to_champion, self.params.retrain.drift, known)

    def _report(self) -> None:
        """Write the candidate's page and copy it beside the history."""
        page = write_review(self.params, self.tree)
        self.paths.retraining.mkdir(parents=True, exist_ok=True)
        copy = self.paths.retraining / f"{self.entry.version}.html"
        shutil.copyfile(page, copy)
        self.entry.page = copy.name


@contextmanager
def _edited(path: Path) -> Iterator[Any]:
    """Yield the values of a params.yaml for editing, and write them back with all comments."""
    yaml = YAML()
    yaml.width = 200
    values = yaml.load(path)
    yield values
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(values, file)


def _set_own_params(path: Path, recorded: list[dict[str, Any]]) -> None:
    """Set OWN_PARAMS in params.yaml to their values in dvc.lock. recorded: each stage's parameters in the lock."""
    with _edited(path) as values:
        own_params = OWN_PARAMS if str(values.get("data", {}).get("source")).startswith("hub:") else OWN_PARAMS[1:]
        for section, key in own_params:
            for params in recorded:
                if f"{section}.{key}" in params:
                    values.setdefault(section, {})[key] = params[f"{section}.{key}"]
                elif key in params.get(section, {}):
                    values.setdefault(section, {})[key] = params[section][key]
                elif section in params:
                    values.get(section, {}).pop(key, None)


def _announce_killed(git: Git, root: Path, recorded: set[str]) -> None:
    """Announce the failure of a retraining that was killed: it has begun to train and has no entry in the history."""
    started = unfinished_since(root)
    if started is None or started in recorded:
        return
    if (params := last_readable_params(git)) is not None:
        _announce_failure(params, root, started, "it was killed")


def _announce_failure(params: Params, root: Path, started: str, reason: str) -> None:
    name = params.project.name
    data = {"started": started, "reason": reason, "summary": f"the retraining of {name} failed: {reason}"}
    try_to_announce(params, root, Event("failure", name, started, data))


def _message(params: Params, entry: Entry, page: Path) -> tuple[str, str]:
    """Return (subject, body) of the notification."""
    lines = [entry.reason]
    for name, why in (entry.drift or {}).get("suspicious", {}).items():
        lines.append(f"{name}: {why}")
    if entry.quarantined:
        lines.append(f"quarantined, trained on but not evaluated on: {', '.join(entry.quarantined)}")
    for name, why in entry.skipped.items():
        lines.append(f"{name} in retrain.incoming is skipped: {why}")
    if entry.excluded:
        lines.append(f"excluded: {', '.join(entry.excluded)} (`peftcore retrain --trust FILE` uses a file again)")
    return f"{params.project.name}: retraining {entry.outcome}", "\n".join([*lines, str(page)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
