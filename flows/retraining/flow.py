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
from flows.errors import ParamsError, PipelineError
from flows.git import Git
from flows.params import Params, load_params
from flows.paths import Paths
from flows.pipeline import is_without_server
from flows.prefect_server import tie_temporary_server
from flows.project import changed_stages, files_at, find_root, stage_order
from flows.promotion.lineage import LOCK, check_artifact_name, headline_metrics
from flows.promotion.project_registry import registry_of
from flows.promotion.promote import promote
from flows.promotion.registry import Version
from flows.promotion.remeasurement import measured_with
from flows.retraining.data import Collected, Source, champion_of, has_been_tried, note_tried, versions_before
from flows.retraining.drift import DriftReport, Known, measure_drift
from flows.retraining.history import Entry, append
from flows.retraining.notice import notify
from flows.retraining.page import write_history_page
from flows.retraining.tree import only_one, remove_working_tree, working_tree
from flows.retraining.trust import read_set_aside, read_vouched, set_aside
from flows.review.page import write_review
from flows.stage_process import run_stage
from peftcore.files import write_atomically

logger = logging.getLogger(__name__)

OWN = (("data", "fresh"), ("data", "replay_share"), ("data", "unproven"), ("train", "start_from"))
"""Parameters that a retraining sets itself."""

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
    return _retrain(find_root(Path(root)), push_to, force, _task)


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
    paths = Paths(root)
    params = load_params(paths.params)
    with only_one(root):
        entry = Entry(started=_now())
        try:
            Retraining(params, root, push_to, force, runner, entry).work()
        except BaseException as error:  # an interruption is told in the history as well
            entry.outcome, entry.reason = "failed", str(error) or type(error).__name__
            raise
        finally:
            entry.finished = _now()
            append(paths, entry)
            write_history_page(params, paths)
            if entry.outcome != "unchanged":
                notify(params.retrain.notify, *_message(params, entry, paths.retraining_page))
    return entry


class Retraining:
    """One retraining at work; `entry` is filled in as it goes."""

    def __init__(
        self, params: Params, root: Path, push_to: str | None, force: bool, runner: Runner, entry: Entry
    ) -> None:
        self.params, self.paths, self.push_to, self.force = params, Paths(root), push_to, force
        self.runner, self.entry = runner, entry
        self.registry = registry_of(params, root)
        check_artifact_name(root, params.project.name)
        self.tree = Paths(working_tree(root))
        # one that was interrupted has changed them
        Git(self.tree.root).run("checkout", "--quiet", "HEAD", "--", self.tree.params.name)
        # what is committed is what is trained; the user may be editing the other
        self.params = load_params(self.tree.params)
        self.distrusted = self.params.data.unproven or []
        self.source = Source(self.params, root, self.tree.root)

    def work(self) -> None:
        """From new data to a verdict."""
        entry, champion = self.entry, champion_of(self.registry, self.params.gate.stage)
        entry.champion = champion.number if champion else None
        collected: Collected = self._run("collect", self._collect)
        entry.files, entry.fresh = len(collected.files), collected.fresh
        reasons = self._reasons(collected)
        if not reasons:
            entry.outcome, entry.reason = "unchanged", f"none of {len(collected.files)} files is new"
            remove_working_tree(self.paths.root)
            return
        logger.info("training: %s", "; ".join(reasons))
        self._settle(collected, champion)
        self._stages(collected, champion)
        promotion = self._run("promote", promote, self.params, self.tree, None, False, self.push_to)
        entry.version, entry.promotion = promotion.version, promotion.as_dict()
        entry.outcome = "promoted" if promotion.outcome == "promoted" else "kept"
        entry.reason = promotion.sentence
        entry.metrics = headline_metrics(self.tree)
        if self.source.files_of(self.registry.version(promotion.version)) != collected.files:
            note_tried(self.paths, collected.files, promotion.version)
        if not promotion.accepted:
            suspicious = (entry.drift or {}).get("suspicious", {})
            entry.set_aside = [name for name in entry.unproven if name in suspicious]  # not what was promoted before
            for name in entry.set_aside:
                why = f"{promotion.version} was refused; {suspicious[name]}"
                set_aside(self.paths, {name: collected.files[name]}, why)
        self._run("report", self._report)
        remove_working_tree(self.paths.root)

    def _run(self, name: str, work: Work, *arguments: Any, retries: int = 0) -> Any:
        started = time.monotonic()
        try:
            return self.runner(name, work, retries, self.params.retrain.retry_delay)(*arguments)
        finally:
            self.entry.seconds[name] = time.monotonic() - started

    def _before(self) -> list[Version]:
        return versions_before(self.registry, self.params.gate.stage)

    def _collect(self) -> Collected:
        return self.source.collect(self._before(), read_set_aside(self.paths), read_vouched(self.paths))

    def _reasons(self, collected: Collected) -> list[str]:
        """Why to train, in words; empty where there is no reason."""
        before = self._before()
        reasons = ["asked for"] if self.force else []
        known = collected.files in [self.source.files_of(version) for version in before] and not collected.fresh
        if not known and not has_been_tried(self.paths, collected.files):
            new = f"{len(collected.fresh)} of {len(collected.files)} files are new"
            reasons.append(new if collected.fresh else "files have gone")
        if self.params.retrain.on == "any" and before and not reasons:
            reasons += self._other_changes(before[0])
        return reasons

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
        if retraining.start == "champion" and champion is not None:
            self.entry.start = champion.number
            fresh = collected.fresh if 0 < len(collected.fresh) < len(collected.files) else None
            data = {"fresh": fresh, "replay_share": retraining.replay_share}
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
            if stage == "fetch" and champion is not None and collected.fresh and self.source.is_path:
                drift = self._run("drift", self._drift, collected, champion)
                self.entry.drift = drift.as_dict()
                self._doubt(drift, collected)

    def _doubt(self, drift: DriftReport, collected: Collected) -> None:
        """Let nothing be judged by new files that are suspicious, unless somebody vouches for them.

        A candidate that has learned wrong rows is better at wrong rows, so by those it would be promoted.
        """
        vouched = read_vouched(self.paths)
        doubted = sorted(name for name in drift.suspicious if collected.files[name] not in vouched)
        for name in doubted:
            logger.warning("%s: %s", name, drift.suspicious[name])
        self._judge_without(doubted, collected)

    def _judge_without(self, names: list[str], collected: Collected) -> None:
        """Hold out no row of these files, nor of those that this was said of before."""
        unproven = sorted({*self.entry.unproven, *names})
        if len(unproven) == len(collected.files):
            logger.warning("there are no files to judge by but those nobody vouches for, so they judge the candidate")
            unproven = []
        if unproven != self.entry.unproven:
            self.entry.unproven = unproven
            self._change({"data": {"unproven": sorted({*self.distrusted, *unproven}) or None}})

    def _drift(self, collected: Collected, champion: Version) -> DriftReport:
        record = self.registry.record(champion)
        loss, is_of_this_base = record["metrics"]["adapter"]["loss"], is_base(self.tree.base, record)
        theirs = measured_with(self.params, self.registry, champion)
        files = [self.tree.adapter] + ([self.tree.labels] if theirs["train"]["objective"] == "classification" else [])
        names = [path.relative_to(self.tree.root).as_posix() for path in files]
        with files_at(self.paths.root, champion.commit, names) as at:
            known = Known(champion.number, loss, at if is_of_this_base else None, theirs)
            return measure_drift(self.tree.root, collected.fresh, self.params.retrain.drift, known)

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
        for section, key in OWN:
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
    if entry.set_aside:
        lines.append(f"set aside: {', '.join(entry.set_aside)} (`peftcore retrain --release FILE` takes one back)")
    return f"{params.project.name}: retraining {entry.outcome}", "\n".join([*lines, str(page)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
