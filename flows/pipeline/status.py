"""Status of the pipeline: running processes, the last run, the champion, the next retraining, disk use.

The status is read from small files, git tags and folders, within a second or two and without any side effect.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from configparser import RawConfigParser
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.gate.sequence import look_of
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.reader import RegistryReader
from flows.runtime.cron import next_time
from flows.runtime.git import Git
from flows.runtime.inputs import unused_changes
from flows.runtime.last_run import last_run, running
from flows.runtime.processes import is_alive, is_noted_alive
from flows.runtime.temporary import leftovers
from flows.runtime.worktree import PREFIX


def status(params: Params, paths: Paths) -> dict[str, Any]:
    """Return the status without the states of the stages, which DVC computes.

    Returns:
        A JSON object; sizes are in bytes, times are ISO 8601 in UTC.
        running: [{what, pid, task, since}] of running processes.
        last_run, champion, candidate: None if there is none.
        looks: place of the newest version in the sequence of looks; None if `gate.sequence.alpha` is null.
        retraining: {last: the last entry of the history, schedule: the schedule or None, incoming: its folder or None}.
        disk: free space and sizes.
        uncommitted: files that a retraining and CI do not see, in words; empty if there are none.
        hints: commands for leftovers of killed processes.
    """
    registry = registry_of(params, paths.root).snapshot()
    holders = registry.stages()
    return {
        "name": registry.name,
        "registry": {stage: holder.version for stage, holder in holders.items()},
        "running": list(_running(paths)),
        "last_run": last_run(paths),
        "champion": _champion(registry, params.gate.stage),
        "candidate": _candidate(registry, paths, params.gate.stage),
        "looks": _looks(registry, params),
        "retraining": {
            "last": next(reversed(_retrainings(paths)), None),
            "schedule": _schedule(paths),
            "incoming": params.retrain.incoming,
        },
        "disk": _disk(registry.git, paths),
        "uncommitted": unused_changes(registry.git),
        "hints": list(_hints(paths)),
    }


def next_step(facts: Mapping[str, Any]) -> str:
    """Return what to do next, with the command.

    Args:
        facts: What `status` returned, with or without the key `stages`.
    """
    candidate, stage_changes = facts["candidate"], facts.get("stages", {})
    first, again, page = "peftcore run", "peftcore run", "reports/review.html"
    if facts["retraining"]["incoming"] is not None:  # only a retraining's working tree has these rows
        first, again, page = "peftcore retrain", "peftcore retrain --force", "reports/retraining/index.html"
        stage_changes = {}
    if any(one["what"] == "run" for one in facts["running"]):
        return "wait for the run that is at work; `peftcore status` shows its task"
    if candidate is None:
        return f"`{first}` makes the first version"
    if changed := [name for name, changes in stage_changes.items() if changes]:
        return f"`peftcore run` runs {', '.join(changed)} again"
    if candidate["verdict"] == "promoted":
        return "`peftcore serve --watch` serves it, `peftcore chat` talks to it, `peftcore retrain` takes in new data"
    if candidate["verdict"] == "refused" and (candidate.get("reason") or "").startswith("approval: "):  # the last check
        return f"once others have approved it, `peftcore promote --version {candidate['version']}` judges it again"
    if candidate["verdict"] == "refused":
        return f"{page} shows why; change params.yaml or the data, and `{again}`"
    if candidate["verdict"] == "rolled back":
        return f"change params.yaml or the data, and `{again}` makes a new version"
    return f"`peftcore promote --version {candidate['version']}` judges it"


def _running(paths: Paths) -> Iterator[dict[str, Any]]:
    run = running(paths)
    if run and run["alive"] is not False:
        yield {"what": "run", "pid": run["pid"], "task": run["task"], "since": run["started"]}
    retraining = _retraining_process(paths)
    if retraining is not None and is_noted_alive(retraining):
        yield {"what": "retraining", "pid": retraining["pid"], "task": None, "since": None}
    for pid, command in _dvc_processes(paths.root).items():
        yield {"what": "dvc", "pid": pid, "task": command, "since": None}


def _dvc_processes(root: Path) -> dict[int, str]:
    """Return {pid: command} of the running processes that hold DVC's locks on files here."""
    locks = _json(root / ".dvc" / "tmp" / "rwlock") or {}
    holders = [*locks.get("write", {}).values(), *(one for some in locks.get("read", {}).values() for one in some)]
    commands = {int(one["pid"]): str(one["cmd"]) for one in holders}
    return {pid: command for pid, command in commands.items() if is_alive(pid)}


def _retraining_process(paths: Paths) -> dict[str, Any] | None:
    """Return the process, alive or not, that last held the lock of retrainings: pid, and host if it is recorded."""
    lock = paths.root / ".dvc" / "tmp" / "retraining" / "lock"
    match = re.fullmatch(r"process (\d+)(?: on (\S+))?\s*", lock.read_text(encoding="utf-8")) if lock.exists() else None
    if match is None:
        return None
    return {"pid": int(match[1])} | ({"host": match[2]} if match[2] else {})


def _champion(registry: RegistryReader, stage: str) -> dict[str, Any] | None:
    """Return the version that holds a stage; `test_loss` (nats) is None if the version has no usable record."""
    holder = registry.stages().get(stage)
    if holder is None:
        return None
    version = holder.version
    records = registry.records([registry.version(version)] if version else [])
    loss = next((record["metrics"]["adapter"]["loss"] for record in records.values()), None)
    return {"stage": stage, "version": version, "since": _date(holder.created), "test_loss": loss}


def _candidate(registry: RegistryReader, paths: Paths, stage: str) -> dict[str, Any] | None:
    """Return the newest version and its verdict, as far as this clone knows it."""
    versions = registry.versions()
    if not versions:
        return None
    newest = versions[-1]
    held = [stage for stage, holder in registry.stages().items() if holder.version == newest.number]
    promotions = (_json(paths.promotion), *(entry.get("promotion") for entry in reversed(_retrainings(paths))))
    judged = next((one for one in promotions if one and one["version"] == newest.number), None)
    if not held and (lost := registry.withdrawn(stage).get(newest.number)):
        verdict, reason = "rolled back", lost
    else:
        verdict = "promoted" if held else judged["outcome"] if judged else "not judged here"
        reason = (judged["report"] or {}).get("reason") if judged and not held else None
    return {"version": newest.number, "since": _date(newest.created), "verdict": verdict, "reason": reason}


def _looks(registry: RegistryReader, params: Params) -> dict[str, Any] | None:
    """Return the newest version's place in the sequence of looks, also in words."""
    evaluated = registry.records(registry.versions()[-1:])
    look = next((look_of(registry, version, params.gate) for version in evaluated), None)
    return None if look is None else asdict(look) | {"in_words": look.in_words(params.gate.sequence)}


def _retrainings(paths: Paths) -> list[dict[str, Any]]:
    """Return the history's complete lines, oldest first."""
    if not paths.retraining_history.exists():
        return []
    lines = paths.retraining_history.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _schedule(paths: Paths) -> dict[str, Any] | None:
    """Return the schedule and its next time; `alive` is None if the scheduler's process is on another host."""
    schedule = _json(paths.schedule)
    if schedule is None:
        return None
    following = next_time(schedule["cron"], schedule["timezone"], datetime.now(UTC))
    return {
        **{key: schedule[key] for key in ("cron", "timezone", "pid")},
        "alive": is_noted_alive(schedule),
        "next": following.isoformat(timespec="seconds"),
    }


def _disk(git: Git, paths: Paths) -> dict[str, Any]:
    trees = [line.removeprefix("worktree ") for line in git.run("worktree", "list", "--porcelain").splitlines()
             if line.startswith("worktree ")][1:]  # fmt: skip
    return {
        "free": shutil.disk_usage(paths.root).free,
        "cache": _size(_cache(paths.root)),
        "checkpoints": _size(paths.checkpoints),
        "worktrees": {tree: _size(Path(tree)) for tree in trees},
    }


def _cache(root: Path) -> Path:
    """Return the path of DVC's cache from DVC's configuration."""
    folder = root / ".dvc"
    config = RawConfigParser()
    config.read([folder / "config", folder / "config.local"])
    return folder / config.get("cache", "dir", fallback="cache")


def _size(folder: Path) -> int:
    """Return the total size of the files below a folder in bytes. Files that vanish meanwhile are skipped."""
    total, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


def _hints(paths: Paths) -> Iterator[str]:
    run = running(paths)
    if run and run["alive"] is False:
        where = f" at {run['task']}" if run["task"] else ""
        yield f"a run that started {run['started']} was killed{where}; `peftcore run` continues it"
    retraining = _retraining_process(paths)
    ended = retraining is None or is_noted_alive(retraining) is False
    if (paths.root / ".dvc" / "tmp" / "retraining" / "tree").exists() and ended:
        yield "a retraining was interrupted; `peftcore retrain` continues it"
    schedule = _json(paths.schedule)
    if schedule and is_noted_alive(schedule) is False:
        yield f"the scheduler (process {schedule['pid']}) has ended; start `peftcore schedule` again"
    if left := len(leftovers(PREFIX)):
        yield f"working trees of killed processes: {left}; `peftcore registry gc` removes them"


def _json(path: Path) -> Any:
    """Return a JSON file's content; None if the file is missing, or incomplete because DVC is writing it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
