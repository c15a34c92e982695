"""How the pipeline stands: what runs, what ran last, who is champion, what is next, how much disk is left.

Read from small files, git tags and folders, so that asking costs no more than a second or two and disturbs nothing.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from configparser import RawConfigParser
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.registry import Registry
from flows.runtime.git import Git
from flows.runtime.last_run import last_run, running
from flows.runtime.processes import is_alive, is_noted_alive
from flows.runtime.worktree import leftovers


def status(params: Params, paths: Paths) -> dict[str, Any]:
    """All of it but the states of the stages, which DVC tells. Sizes in bytes, times ISO 8601 in UTC, seconds of work.

    running: processes that live, [{what, pid, task, since}]. last_run, champion, candidate: None where there is none.
    retraining: its last entry and its schedule. disk: free bytes and sizes. hints: what to do about leftovers.
    """
    registry = registry_of(params, paths.root)
    holders = registry.stages()
    return {
        "name": registry.name,
        "registry": {stage: holder.version for stage, holder in holders.items()},
        "running": list(_running(paths)),
        "last_run": last_run(paths),
        "champion": _champion(registry, params.gate.stage),
        "candidate": _candidate(registry, paths),
        "retraining": {"last": _last_retraining(paths), "schedule": _schedule(paths)},
        "disk": _disk(registry.git, paths),
        "hints": list(_hints(paths)),
    }


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
    """{process: its command} of those that DVC notes to be at work on files here, and that live."""
    locks = _json(root / ".dvc" / "tmp" / "rwlock") or {}
    holders = [*locks.get("write", {}).values(), *(one for some in locks.get("read", {}).values() for one in some)]
    found = {int(one["pid"]): str(one["cmd"]) for one in holders}
    return {pid: command for pid, command in found.items() if is_alive(pid)}


def _retraining_process(paths: Paths) -> dict[str, Any] | None:
    """Who wrote the lock of retrainings last, living or not: pid, and host where it is noted."""
    lock = paths.root / ".dvc" / "tmp" / "retraining" / "lock"
    found = re.fullmatch(r"process (\d+)(?: on (\S+))?\s*", lock.read_text()) if lock.exists() else None
    if found is None:
        return None
    return {"pid": int(found[1])} | ({"host": found[2]} if found[2] else {})


def _champion(registry: Registry, stage: str) -> dict[str, Any] | None:
    holder = registry.stages().get(stage)
    if holder is None:
        return None
    version = holder.version
    loss = registry.record(registry.version(version))["metrics"]["adapter"]["loss"] if version else None
    return {"stage": stage, "version": version, "since": _date(holder.created), "test_loss": loss}


def _candidate(registry: Registry, paths: Paths) -> dict[str, Any] | None:
    """The newest version, and what became of it as far as this clone knows."""
    versions = registry.versions()
    if not versions:
        return None
    newest = versions[-1]
    held = [stage for stage, holder in registry.stages().items() if holder.version == newest.number]
    promotions = (_json(paths.promotion), (_last_retraining(paths) or {}).get("promotion"))
    judged = next((one for one in promotions if one and one["version"] == newest.number), None)
    verdict = "promoted" if held else judged["outcome"] if judged else "not judged here"
    reason = (judged["report"] or {}).get("reason") if judged and not held else None
    return {"version": newest.number, "since": _date(newest.created), "verdict": verdict, "reason": reason}


def _last_retraining(paths: Paths) -> dict[str, Any] | None:
    """The history's last line that is whole."""
    if not paths.retraining_history.exists():
        return None
    lines = [line for line in paths.retraining_history.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1]) if lines else None


def _schedule(paths: Paths) -> dict[str, Any] | None:
    """When retraining is next; alive: whether the process that shall do it lives, None if it is another host's."""
    from cronsim import CronSim

    schedule = _json(paths.schedule)
    if schedule is None:
        return None
    following = next(CronSim(schedule["cron"], datetime.now(ZoneInfo(schedule["timezone"]))))
    return {
        **{key: schedule[key] for key in ("cron", "timezone", "pid")},
        "alive": is_noted_alive(schedule),
        "next": following.astimezone(UTC).isoformat(timespec="seconds"),
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
    """DVC's cache, by its own configuration."""
    folder = root / ".dvc"
    config = RawConfigParser()
    config.read([folder / "config", folder / "config.local"])
    return folder / config.get("cache", "dir", fallback="cache")


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; 0 if there is none. What goes away meanwhile is passed over."""
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
        yield f"a run that began {run['started']} was killed{where}; `peftcore run` goes on with it"
    retraining = _retraining_process(paths)
    ended = retraining is None or is_noted_alive(retraining) is False
    if (paths.root / ".dvc" / "tmp" / "retraining" / "tree").exists() and ended:
        yield "a retraining was interrupted; `peftcore retrain` goes on with it"
    schedule = _json(paths.schedule)
    if schedule and is_noted_alive(schedule) is False:
        yield f"the scheduler (process {schedule['pid']}) lives no more; start `peftcore schedule` again"
    if left := len(leftovers()):
        yield f"{left} working trees of killed processes are left; `peftcore registry gc` removes them"


def _json(path: Path) -> Any:
    """None for a file that is absent, or that DVC is writing in place just now."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
