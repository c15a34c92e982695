"""Free DVC's cache, and its remote, of files that no version which matters needs; the tags stay, they are the audit.

Needed is what has a stage, had one (for a rollback), is among the newest, and whatever a branch, another tag, an
experiment or a working tree refers to. Used objects are found and removed by DVC itself, under its locks.

A promotion may come between looking and removing. Before a version's files go from the remote it is marked, then the
stages are looked at again; whoever promotes makes the tag, then looks for the mark (`Registry.assign`). So one of the
two sees the other, whatever the order, and no stage is left without files. Between clones this holds for the tags that
they have pushed; a run that is being registered from another clone is not known here.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.errors import RegistryError, RepositoryError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.registry import COLLECTED, Registry, Version
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git
from flows.runtime.worktree import leftovers, remove_worktree

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo

NEWEST = 5
"""Versions that are kept for being new, if nothing else is said."""


class Freed(NamedTuple):
    """What goes from one place. size: bytes."""

    objects: int
    size: int


@dataclass(frozen=True)
class Collection:
    """What was removed, or would be."""

    dry_run: bool
    kept: dict[str, str]
    """{version: why its files stay}"""
    collected: list[str]
    """Versions that nothing needs: their files leave the cache, and with a remote every place."""
    lost: list[str]
    """Kept versions whose adapter is in neither cache nor remote."""
    cache: Freed
    remote: Freed | None
    leftovers: dict[str, int] = field(default_factory=dict)
    """{folder of a working tree whose process is gone: bytes}"""

    def as_dict(self) -> dict[str, Any]:
        freed = {name: one._asdict() if one else None for name, one in (("cache", self.cache), ("remote", self.remote))}
        return asdict(self) | freed


def collect_garbage(
    params: Params,
    paths: Paths,
    keep: int = NEWEST,
    remote: bool = False,
    forget_past: bool = False,
    dry_run: bool = False,
    push_to: str | None = None,
    exclusive: bool = False,
) -> Collection:
    """Remove what no kept version needs from DVC's cache.

    keep: newest versions that stay. remote: from the DVC remote `register.remote` too; such a version cannot be had any
    more, and is marked so. forget_past: versions that only had a stage may go. dry_run: tell, remove nothing.
    push_to: a git remote whose tags are fetched first, and that gets the marks. exclusive: no other repository uses the
    DVC remote, so that whatever this one has never referred to may go from it too.
    Raises RepositoryError if DVC is at work, cannot tell what is used, or the remote holds objects of others.
    """
    git = Git(paths.root)
    registry = registry_of(params, paths.root, sign=push_to is not None)
    if push_to is not None:
        synchronise(registry, push_to)
    leftovers = _leftovers(dry_run, git)
    with _locked(paths.root, [Path(name) for name in leftovers]) as repos:
        if remote and not exclusive:
            _check_alone(repos, registry, params.register.remote)
        kept, used, gone, lost = _decide(registry, repos, keep, forget_past, remote, mark=remote and not dry_run)
        if push_to is not None and remote and gone and not dry_run:
            git.push_tags(push_to, [_mark(registry, version) for version in gone])
        freed = _free_cache(repos[0], used, dry_run)
        there = _free_remote(repos[0], params.register.remote, used, dry_run) if remote else None
    numbers = [version.number for version in gone]
    return Collection(dry_run, kept, numbers, [version.number for version in lost], freed, there, leftovers)


def _check_alone(repos: list["Repo"], registry: Registry, name: str) -> None:
    """Raise RepositoryError if the DVC remote holds objects that no commit or version of this repository refers to.

    Another repository that shares the remote may need them, and any other object too: equal files are one object.
    """
    versions = [tag.commit for tag in registry.git.tags(f"{registry.name}@*", f"{registry.name}#*")]
    known = [repos[0].used_objs(revs=sorted(set(versions)), all_commits=True, all_tags=True, all_branches=True,
                                all_experiments=True, force=True)]  # fmt: skip
    known += [repo.used_objs(force=True) for repo in repos[1:]]
    place = repos[0].cloud.get_remote_odb(name, "gc", hash_name="md5")
    hashes = {one.value for each in known for objects in each.values() for one in objects}
    for version in registry.versions():  # DVC passes over a folder whose list of files the cache has lost
        hashes |= _outputs(registry, version)
    there = set(place.all())
    for folder in [one for one in there & hashes if one.endswith(".dir")]:
        hashes |= {file["md5"] for file in json.loads(place.fs.cat_file(place.oid_to_path(folder)))}
    if strangers := there - hashes:
        raise RepositoryError(
            f"the DVC remote {name!r} holds {len(strangers):,} objects that nothing in this repository has ever "
            "referred to, so another repository may use it, and its files would be lost; nothing was removed. If none "
            "does, give --exclusive"
        )


def kept_versions(registry: Registry, keep: int, forget_past: bool) -> dict[str, str]:
    """{version: why its files have to stay}"""
    why = {version.number: f"one of the {keep} newest" for version in registry.versions()[-keep:] if keep}
    for stage in sorted(registry.stages_ever()):
        past = {} if forget_past else {one.version: f"was {stage}" for one in registry.holders(stage)}
        why |= {number: reason for number, reason in past.items() if number}
    now = registry.stages().values()
    return why | {one.version: f"is {one.stage}" for one in now if one.version}


def _decide(
    registry: Registry, repos: list["Repo"], keep: int, forget_past: bool, remote: bool, mark: bool
) -> tuple[dict[str, str], set["HashInfo"], list[Version], list[Version]]:
    """(kept versions, used objects, versions that go, kept ones without files), as nobody promotes meanwhile."""
    while True:
        event, versions = registry.last_event(), registry.versions()
        kept = kept_versions(registry, keep, forget_past)
        used = _used(repos, _revisions(registry, kept, forget_past))
        hashes = {one.value for one in used}
        adapters = {version: _adapter_hash(registry, version) for version in versions}
        collected, cache = registry.collected(), repos[0].cache.local
        gone = [
            one
            for one, adapter in adapters.items()
            if adapter and one.number not in (*kept, *collected) and adapter not in hashes
            if remote or cache.exists(adapter)
        ]
        lost = [one for one, adapter in adapters.items() if one.number in kept and adapter and adapter not in hashes]
        for version in gone if mark else ():
            text = f"The files of {version.tag} were removed: it had no stage, and {keep} newer ones are kept\n"
            registry.git.create_tag(_mark(registry, version), version.commit, text, after=0)
        if registry.last_event() == event:
            return kept, used, gone, lost
        for version in gone if mark else ():
            registry.git.delete_tag(_mark(registry, version))


def _mark(registry: Registry, version: Version) -> str:
    return COLLECTED.format(name=registry.name, version=version.number)


def _outputs(registry: Registry, version: Version) -> set[str]:
    """DVC's hashes of a version's outputs; none for a version that somebody tagged by hand, without a record."""
    try:
        return set(registry.record(version)["dvc"].values())
    except RegistryError:
        return set()


def _adapter_hash(registry: Registry, version: Version) -> str | None:
    """DVC's hash of a version's adapter; None for a version that somebody tagged by hand, without a record."""
    try:
        return registry.record(version)["dvc"].get("artifacts/adapter")
    except RegistryError:
        return None


def _revisions(registry: Registry, kept: dict[str, str], forget_past: bool) -> list[str]:
    """Commits whose files stay: of kept versions and stages, and whatever another reference names."""
    fields = "--format=%(objecttype) %(*objecttype) %(objectname) %(*objectname) %(refname)"
    name = re.escape(registry.name)
    own = re.compile(rf"refs/tags/({name}[@#]|collected/{name}/).*")
    found = {registry.git.head()}
    for line in registry.git.run("for-each-ref", fields, "refs/heads", "refs/remotes", "refs/tags").splitlines():
        kind, target_kind, commit, target, ref = line.split(" ", 4)
        if not own.fullmatch(ref) and "commit" in (kind, target_kind):
            found.add(target or commit)
    stages = registry.stages()
    found |= {one.commit for one in stages.values()}
    if not forget_past:
        found |= {one.commit for stage in registry.stages_ever() for one in registry.holders(stage)}
    found |= {version.commit for version in registry.versions() if version.number in kept}
    return sorted(found)


@contextmanager
def _locked(root: Path, leaving_out: list[Path]) -> Iterator[list["Repo"]]:
    """This repository as DVC has it, then its other working trees, all of them locked."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    folders = [root, *(tree for tree in _working_trees(Git(root)) if tree != root and (tree / ".dvc").is_dir())]
    log = logging.getLogger("dvc")
    with warnings.catch_warnings(), ExitStack() as stack:
        # DVC uses an old way of its trie library
        warnings.filterwarnings("ignore", "_NoneStep.value", DeprecationWarning)
        # and warns of each output that a commit has without a hash, from before its first run
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        repos = []
        for folder in folders:
            if any(folder.is_relative_to(one) for one in leaving_out):
                continue
            repos.append(stack.enter_context(Repo(str(folder))))
            try:
                stack.enter_context(lock_repo(repos[-1]))
            except LockError as error:
                raise RepositoryError(
                    f"DVC is at work in {folder}, so nothing was removed; try again when it has finished"
                ) from error
        try:
            yield repos
        except DvcException as error:
            raise RepositoryError(f"DVC cannot tell what is used: {error.__cause__ or error}") from error


def _working_trees(git: Git) -> list[Path]:
    lines = git.run("worktree", "list", "--porcelain").splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


def _used(repos: list["Repo"], revisions: list[str]) -> set["HashInfo"]:
    """Objects of every working tree as it is, and of these commits and all experiments.

    A folder whose list of files can be had neither here nor from a remote is lost already, so it stops nothing.
    """
    found = [repos[0].used_objs(revs=revisions, all_experiments=True, force=True)]
    found += [repo.used_objs(force=True) for repo in repos[1:]]
    return {one for by_place in found for objects in by_place.values() for one in objects}


def _free_cache(repo: "Repo", used: set["HashInfo"], dry_run: bool) -> Freed:
    places = {id(place): place for _, place in repo.cache.by_scheme() if place}
    freed = [_free(place, used, dry_run) for place in places.values()]
    return Freed(sum(one.objects for one in freed), sum(one.size for one in freed))


def _free_remote(repo: "Repo", name: str, used: set["HashInfo"], dry_run: bool) -> Freed:
    from dvc_data.hashfile.db import get_index

    place = repo.cloud.get_remote_odb(name, "gc", hash_name="md5")
    freed = _free(place, used, dry_run)
    if freed.objects and not dry_run:
        get_index(place).clear()  # DVC's note of what the remote has
    return freed


def _free(place: "HashFileDB", used: set["HashInfo"], dry_run: bool) -> Freed:
    from dvc_data.hashfile.gc import gc

    hashes = {one.value for one in used if one.name == place.hash_name}
    sizes = [place.fs.size(place.oid_to_path(one)) or 0 for one in place.all() if one not in hashes]
    return Freed(len(sizes) if dry_run or not sizes else gc(place, used), sum(sizes))


def _leftovers(dry_run: bool, git: Git) -> dict[str, int]:
    """Temporary working trees whose process was killed, with their bytes; removed unless it is a dry run."""
    found = {}
    for folder in leftovers():
        found[str(folder)] = sum(path.lstat().st_size for path in folder.rglob("*"))
        if not dry_run:
            remove_worktree(git.root, folder / "tree")
            shutil.rmtree(folder)
    if not dry_run:
        git.run("worktree", "prune")
    return found
