"""The Prefect flow of a retraining: new data, the stages in a working tree of their own, the gate, a report either way.

    collect -> fetch -> drift -> prepare ... register -> promote or keep -> report

Data that no version has learnt from make it train; without, it is over in seconds. Like the pipeline's flow it goes on
without Prefect's server where there is none, and imports no torch.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from ruamel.yaml import YAML

from flows.base.identity import is_base
from flows.errors import ParamsError, PipelineError, RegistryConflict
from flows.gate.promote import Promotion, last_version, promote
from flows.gate.reevaluation import measured_with
from flows.params import Params, left_over, load_params
from flows.paths import Paths
from flows.pipeline import is_without_server
from flows.registry.lineage import LOCK, check_artifact_name, headline_metrics
from flows.registry.project_registry import registry_of
from flows.registry.registry import Version
from flows.registry.synchronise import synchronise
from flows.retraining.committed import committed_params, last_readable_params
from flows.retraining.data import Collected, Files, Source, champion_of, has_been_tried, note_tried, versions_before
from flows.retraining.drift import DriftReport, Known, measure_drift, spread_of
from flows.retraining.history import Entry, append, entries
from flows.retraining.notice import notify
from flows.retraining.page import write_history_page
from flows.retraining.tree import is_unfinished, note_unfinished, only_one, remove_working_tree, working_tree
from flows.retraining.trust import read_set_aside, read_vouched, set_aside
from flows.review.page import write_review
from flows.runtime.git import Git
from flows.runtime.inputs import unused_changes
from flows.runtime.prefect_server import tie_temporary_server
from flows.runtime.project import changed_stages, files_at, find_root, stage_order
from flows.runtime.stage_process import run_stage
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)

TRIES = 3
"""Tries to be first where others register or promote at the same time."""
OWN = (("data", "source"), ("data", "new_files"), ("data", "replay_share"), ("data", "quarantined"), ("train", "start_from"))
"""Parameters that a retraining sets itself; data.source if it is a hub's, whose revision it adds."""

Work = Callable[..., Any]
Runner = Callable[[str, Work, int, float], Work]
"""(name, work, retries, seconds before a retry) -> the same work, watched over"""


def run_retraining(root: Path, push_to: str | None = None, force: bool = False) -> Entry:
    """`retrain` below; where Prefect's server is not there, or goes away, the same work goes on without it."""
    try:
        tie_temporary_server()
        return retrain(str(root), push_to, force)
    except (RuntimeError, httpx.TransportError) as error:
        if not is_without_server(error):
            raise
        logger.warning("Prefect's server is not there (%s); going on without it", error)
    return _retrain(root, push_to, force, _tried_again)


@flow(name="retrain", validate_parameters=False)
def retrain(root: str = ".", push_to: str | None = None, force: bool = False) -> Entry:
    """Train, judge and promote or keep, if there is something new; what came of it is in the history either way.

    root: the repository, or a folder in it. push_to: the git remote that decides who is promoted. force: even if
    nothing is new. Raises BusyError if another retraining runs, and whatever made this one fail.
    """
    # a deployment's text is empty where its variable is not set
    return _retrain(find_root(Path(root)), push_to or None, force, _task)


def _task(name: str, work: Work, retries: int, delay: float) -> Work:
    return Task(work, name=name, task_run_name=name, cache_policy=NO_CACHE, retries=retries, retry_delay_seconds=delay)


def _tried_again(_: str, work: Work, retries: int, delay: float) -> Work:
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
        logger.warning(
            "what is committed is what is trained, so this is not used: %s; `git commit` it to have it trained", unused
        )
    with only_one(root):
        entry, told_before = Entry(started=_now()), [entry.passed_over for entry in entries(paths)[-1:]]
        try:
            Retraining(root, push_to, force, runner, entry).work()
        except BaseException as error:  # an interruption is told in the history as well
            entry.outcome, entry.reason = "failed", str(error) or type(error).__name__
            raise
        finally:
            entry.finished = _now()
            append(paths, entry)
            params = last_readable_params(git)
            if params is not None:
                write_history_page(params, paths)
                if entry.outcome != "unchanged" or (entry.passed_over and [entry.passed_over] != told_before):
                    notify(params.retrain.notify, *_message(params, entry, paths.retraining_page))
    return entry


class Retraining:
    """One retraining at work; `entry` is filled in as it goes."""

    def __init__(self, root: Path, push_to: str | None, force: bool, runner: Runner, entry: Entry) -> None:
        self.paths, self.push_to, self.force = Paths(root), push_to, force
        self.runner, self.entry = runner, entry
        # what is committed is what is trained; the user may be editing the other
        self.params = committed_params(Git(root))
        self.registry = registry_of(self.params, root, sign=True)
        self.unfinished = is_unfinished(root)
        self.tree = Paths(working_tree(root))
        # one that was interrupted has changed them
        Git(self.tree.root).run("checkout", "--quiet", "HEAD", "--", self.tree.params.name)
        check_artifact_name(self.tree.root, self.params.project.name)
        for told in left_over(self.params):
            logger.warning("%s", told)
        self.distrusted = self.params.data.quarantined or []
        self.source = Source(self.params, root, self.tree.root)

    def work(self) -> None:
        """From new data to a verdict."""
        if self.push_to is not None:
            self._run("fetch tags", self._fetch_tags, self.push_to)
        entry, champion = self.entry, champion_of(self.registry, self.params.gate.stage)
        entry.champion = champion.number if champion else None
        collected: Collected = self._run("collect", self._collect, champion)
        entry.files, entry.fresh = len(collected.files), collected.fresh
        entry.passed_over = collected.passed_over
        for name, why in collected.passed_over.items():
            logger.warning("retrain.incoming: %s is not taken: %s", name, why)
        reasons = self._reasons(collected)
        if not reasons:
            entry.outcome, entry.reason = "unchanged", f"none of {len(collected.files)} files is new"
            remove_working_tree(self.paths.root)
            return
        logger.info("training: %s", "; ".join(reasons))
        note_unfinished(self.paths.root)
        self._settle(collected, champion)
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
            suspicious = (entry.drift or {}).get("suspicious", {})
            entry.set_aside = [name for name in entry.unproven if name in suspicious]  # not what was promoted before
            for name in entry.set_aside:
                why = f"{promotion.version} was refused; {suspicious[name]}"
                set_aside(self.paths, {name: collected.files[name]}, why)
        self._run("report", self._report)
        remove_working_tree(self.paths.root)

    def _fetch_tags(self, remote: str) -> None:
        """Take in what others have registered and promoted."""
        synchronise(self.registry, remote)

    def _take_number(self, remote: str) -> None:
        """Push the candidate's tag, by which its number is its own; where another has it, give it the next number.

        Raises RegistryConflict if others are faster each time.
        """
        for _ in range(TRIES):
            synchronise(self.registry, remote)
            try:
                self.registry.push_version(remote, last_version(self.registry, self.tree))
                return
            except RegistryConflict as error:
                logger.warning("%s", error)
        raise RegistryConflict(f"others have registered a version {TRIES} times meanwhile; run this again")

    def _promote(self) -> Promotion:
        """Judge the candidate, again if the stage changes hands meanwhile. Raises RegistryConflict."""
        for _ in range(TRIES - 1):
            try:
                return promote(self.params, self.tree, None, False, self.push_to)
            except RegistryConflict as error:
                logger.warning("%s; judging it once more", error)
                if self.push_to is not None:
                    self._fetch_tags(self.push_to)
        return promote(self.params, self.tree, None, False, self.push_to)

    def _run(self, name: str, work: Work, *arguments: Any, retries: int = 0) -> Any:
        started = time.monotonic()
        try:
            return self.runner(name, work, retries, self.params.retrain.retry_delay)(*arguments)
        finally:
            self.entry.seconds[name] = time.monotonic() - started

    def _before(self) -> list[Version]:
        return versions_before(self.registry, self.params.gate.stage)

    def _collect(self, champion: Version | None) -> Collected:
        # others may register versions without a list of files, whose commits hold no data that have come in
        listed = next((one for one in reversed(self.registry.versions()) if self.source.files_of(one)), None)
        before = [*([listed] if listed else []), *self._before()]
        return self.source.collect(before, champion, read_set_aside(self.paths), read_vouched(self.paths))

    def _reasons(self, collected: Collected) -> list[str]:
        """Why to train, in words; empty where there is no reason."""
        before = self._before()
        reasons = ["asked for"] if self.force else []
        if self.unfinished:
            reasons.append("the last one came to no verdict")
        known = not collected.fresh and self._is_known(collected.files)
        if not known and not has_been_tried(self.paths, collected.files):
            new = f"{len(collected.fresh)} of {len(collected.files)} files are new"
            reasons.append(new if collected.fresh else "files have gone")
        if self.params.retrain.on == "any" and before and not reasons:
            reasons += self._other_changes(before[0])
        return reasons

    def _is_known(self, files: Files) -> bool:
        """Whether some version, promoted or refused, has learnt from just these files."""
        return any(self.source.files_of(version) == files for version in reversed(self.registry.versions()))

    def _other_changes(self, newest: Version) -> list[str]:
        """What else differs from the newest version's inputs, by its dvc.lock: parameters, code.

        What a retraining sets itself is no difference, nor are the files of rows, which `_reasons` knows by content.
        """
        lock = self.registry.git.show(newest.commit, LOCK)
        write_atomically(self.tree.root / LOCK, lock)
        recorded = YAML(typ="safe").load(lock)["stages"]
        made = [out["path"] for stage in recorded.values() for out in stage.get("outs", [])]
        committed = self.tree.params.read_bytes()
        _set_own_params(
            self.tree.params, [stage.get("params", {}).get("params.yaml", {}) for stage in recorded.values()]
        )
        try:
            changes = changed_stages(self.tree.root, list(recorded))
        finally:
            write_atomically(self.tree.params, committed)
        words = {word for words in changes.values() for word in words}
        return sorted(word for word in words if not (any(out in word for out in made) or self._is_of_the_rows(word)))

    def _is_of_the_rows(self, word: str) -> bool:
        place = word.partition(" ")[2]
        return self.source.is_path and f"{self.source.name}/".startswith(f"{place}/")

    def _settle(self, collected: Collected, champion: Version | None) -> None:
        """Fix what is trained on and from: the data in a commit, the rest in the tree's params.yaml."""
        retraining = self.params.retrain
        if retraining.start == "champion" and self.params.data.assignment != "hashed":
            raise ParamsError(
                "retrain.start is champion and data.assignment is filled, by which rows that the champion learnt could "
                "become test rows as data grow; give data.assignment: hashed, or retrain.start: scratch"
            )
        if self.params.data.assignment == "filled":
            logger.warning("data.assignment is filled: data that grow can move rows between splits; hashed never does")
        self.source.keep(collected)
        if (pinned := self.source.pinned(collected.files)) is not None:
            self._change({"data": {"source": pinned}})
        if retraining.start == "champion" and champion is not None:
            self.entry.start = champion.number
            fresh = collected.unlearned if 0 < len(collected.unlearned) < len(collected.files) else None
            data = {"new_files": fresh, "replay_share": retraining.replay_share}
            self._change({"train": {"start_from": champion.number}, "data": data})
        self._judge_without(collected.unproven, collected)

    def _change(self, changes: dict[str, dict[str, Any]]) -> None:
        """Set parameters in the tree."""
        with _edited(self.tree.params) as values:
            for section, keys in changes.items():
                values.setdefault(section, {}).update(keys)
        self.params = load_params(self.tree.params)

    def _stages(self, collected: Collected, champion: Version | None) -> None:
        """Run every stage; after the first the drift is measured, for which the base is needed."""
        stages = stage_order(self.tree.root)
        for done, stage in enumerate(stages):
            arguments = (self.tree.root, stage, self.params.retrain.stage_timeout, False, f"{done}/{len(stages)}")
            self._run(stage, run_stage, *arguments, retries=self.params.retrain.retries)
            if stage == "fetch" and champion is not None and collected.unlearned and self.source.is_path:
                drift = self._run("drift", self._drift, collected, champion)
                self.entry.drift = drift.as_dict()
                self._doubt(drift, collected)

    def _doubt(self, drift: DriftReport, collected: Collected) -> None:
        """Let nothing be judged by new files that are suspicious or too small to tell, but for those vouched for.

        A candidate that has learned wrong rows is better at wrong rows, so by those it would be promoted.
        """
        vouched = read_vouched(self.paths)
        told = drift.unsure | drift.suspicious
        doubted = sorted(name for name in told if collected.files[name] not in vouched)
        for name in doubted:
            logger.warning("%s: %s", name, told[name])
        self._judge_without(doubted, collected)

    def _judge_without(self, names: list[str], collected: Collected) -> None:
        """Hold out no row of these files, nor of those that this was said of before."""
        unproven = sorted({*self.entry.unproven, *names})
        if len(unproven) == len(collected.files):
            logger.warning("there are no files to judge by but those nobody vouches for, so they judge the candidate")
            unproven = []
        if unproven != self.entry.unproven:
            self.entry.unproven = unproven
            self._change({"data": {"quarantined": sorted({*self.distrusted, *unproven}) or None}})

    def _drift(self, collected: Collected, champion: Version) -> DriftReport:
        record = self.registry.record(champion)
        loss, is_of_this_base = record["metrics"]["adapter"]["loss"], is_base(self.tree.base, record)
        theirs = measured_with(self.params, self.registry, champion)
        files = [self.tree.adapter] + ([self.tree.labels] if theirs["train"]["objective"] == "classification" else [])
        names = [path.relative_to(self.tree.root).as_posix() for path in (*files, self.tree.evaluation_rows)]
        with files_at(self.paths.root, champion.commit, names) as at:
            spread = spread_of(at / names[-1])
            known = Known(champion.number, loss, spread, at if is_of_this_base else None, theirs)
            return measure_drift(self.tree.root, collected.unlearned, self.params.retrain.drift, known)

    def _report(self) -> None:
        """The candidate's page, kept beside the history."""
        page = write_review(self.params, self.tree)
        self.paths.retraining.mkdir(parents=True, exist_ok=True)
        kept = self.paths.retraining / f"{self.entry.version}.html"
        shutil.copyfile(page, kept)
        self.entry.page = kept.name


@contextmanager
def _edited(path: Path) -> Iterator[Any]:
    """The values of a params.yaml, to change some; the rest stays, comments too."""
    yaml = YAML()
    yaml.width = 200
    values = yaml.load(path)
    yield values
    with path.open("w") as file:
        yaml.dump(values, file)


def _set_own_params(path: Path, recorded: list[dict[str, Any]]) -> None:
    """Make what a retraining sets itself what it was where these were recorded, as dvc.lock has them by stage."""
    with _edited(path) as values:
        own = OWN if str(values.get("data", {}).get("source")).startswith("hub:") else OWN[1:]
        for section, key in own:
            for params in recorded:
                if f"{section}.{key}" in params:
                    values.setdefault(section, {})[key] = params[f"{section}.{key}"]
                elif key in params.get(section, {}):
                    values.setdefault(section, {})[key] = params[section][key]
                elif section in params:
                    values.get(section, {}).pop(key, None)


def _message(params: Params, entry: Entry, page: Path) -> tuple[str, str]:
    """(subject, body) for whoever is told."""
    lines = [entry.reason]
    for name, why in (entry.drift or {}).get("suspicious", {}).items():
        lines.append(f"{name}: {why}")
    if entry.unproven:
        lines.append(f"nothing was judged by: {', '.join(entry.unproven)}")
    for name, why in entry.passed_over.items():
        lines.append(f"{name} in retrain.incoming is not taken: {why}")
    if entry.set_aside:
        lines.append(f"set aside: {', '.join(entry.set_aside)} (`peftcore retrain --release FILE` takes one back)")
    return f"{params.project.name}: retraining {entry.outcome}", "\n".join([*lines, str(page)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
