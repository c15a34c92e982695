"""Garbage collection: remove the files of versions that nothing needs from DVC's cache and remote. Tags stay.

A version's files are kept if the version has a stage, had a stage (for a rollback), or is among the newest. Files are
also kept if a branch, another tag, an experiment or a working tree refers to them. DVC itself finds the used objects
and removes the others, under its own locks.

A promotion may run between reading the tags and removing files. So garbage collection first marks a version by a tag,
then reads the stages again, and only then removes the version's files from the remote. A promotion first makes its tag
and then looks for the mark (`Registry.assign`). In any order, at least one of the two detects the other, so no version
with a stage loses its files. Between clones this
holds for pushed tags only: a run that another clone is registering is not known here.
"""

import hashlib
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
from flows.registry.reader import COLLECTED, RegistryReader, Version
from flows.registry.registry import Registry
from flows.registry.synchronise import synchronise
from flows.runtime.git import Git
from flows.runtime.project import open_repo
from flows.runtime.temporary import leftovers
from flows.runtime.worktree import PREFIX, remove_worktree

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo

NEWEST = 5
"""Default number of newest versions whose files are kept."""


class Freed(NamedTuple):
    """Number and total size (bytes) of the objects that were removed from one storage."""

    objects: int
    size: int


@dataclass(frozen=True)
class Collection:
    """The removed files; with `dry_run`, the files that a real run would remove."""

    dry_run: bool
    kept: dict[str, str]
    """{version: why its files stay}"""
    collected: list[str]
    """Versions whose files leave the cache, and with a remote the remote too."""
    lost: list[str]
    """Kept versions whose adapter is in neither cache nor remote."""
    cache: Freed
    remote: Freed | None
    leftovers: dict[str, int] = field(default_factory=dict)
    """{temporary working tree of a killed process: bytes}"""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
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
    """Remove files that no kept version needs from DVC's cache.

    Args:
        params: the project's parameters.
        paths: the repository.
        keep: number of newest versions to keep.
        remote: also remove from the DVC remote `register.remote`. Such a version is lost for good and marked by a tag.
        forget_past: also remove versions that had a stage and have none now.
        dry_run: report only.
        push_to: a git remote whose tags are fetched first, and that gets the marks.
        exclusive: no other repository uses the DVC remote, so its objects that are unknown here may be removed.

    Raises:
        RepositoryError: DVC is busy or cannot find the used objects, or the remote has objects of other repositories.
    """
    git = Git(paths.root)
    registry = registry_of(params, paths.root, sign=push_to is not None)
    if push_to is not None:
        synchronise(registry, push_to)
    leftovers = _leftovers(dry_run, git)
    with _locked(paths.root, [Path(name) for name in leftovers]) as repos:
        if remote:
            _fetch_lists(repos[0], params.register.remote)
        if remote and not exclusive:
            _check_alone(repos, registry, params.register.remote)
        kept, used, removable, lost = _decide(registry, repos, keep, forget_past, remote, mark=remote and not dry_run)
        if push_to is not None and remote and not dry_run:
            _push_marks(registry, push_to)
        freed = _free_cache(repos[0], used, dry_run)
        freed_remote = _free_remote(repos[0], params.register.remote, used, dry_run) if remote else None
    numbers = [version.number for version in removable]
    return Collection(dry_run, kept, numbers, [version.number for version in lost], freed, freed_remote, leftovers)


def _check_alone(repos: list["Repo"], registry: Registry, name: str) -> None:
    """Check that every object of the DVC remote belongs to a commit or version of this repository.

    Otherwise another repository may share the remote, and it may need any object, because equal files are one object.
    The cache has the remote's lists of folders' files, by `_fetch_lists`.
    """
    versions = [tag.commit for tag in registry.tags(f"{registry.name}@*", f"{registry.name}#*")]
    used = [repos[0].used_objs(revs=sorted(set(versions)), all_commits=True, all_tags=True, all_branches=True,
                                all_experiments=True, force=True)]  # fmt: skip
    used += [repo.used_objs(force=True) for repo in repos[1:]]
    remote_store, cache = repos[0].cloud.get_remote_odb(name, "gc", hash_name="md5"), repos[0].cache.local
    hashes = {one.value for each in used for objects in each.values() for one in objects}
    for version in registry.versions():  # DVC skips a folder if the cache has lost its list of files
        hashes |= _outputs(registry, version)
    remote_hashes = set(remote_store.all())
    for folder in [one for one in remote_hashes & hashes if one.endswith(".dir")]:
        hashes |= {file["md5"] for file in json.loads(cache.fs.cat_file(cache.oid_to_path(folder)))}
    if strangers := remote_hashes - hashes:
        raise RepositoryError(
            f"the DVC remote {name!r} holds {len(strangers):,} objects that this repository has never referred to. "
            "Another repository may use the remote and would lose files, so nothing was removed. If no other "
            "repository uses it, give --exclusive"
        )


def _fetch_lists(repo: "Repo", name: str) -> None:
    """Copy folders' lists of files that the cache lacks from a DVC remote.

    DVC takes the files of a folder for unused if it cannot get the list, also if that is only a failure of the network.

    Raises:
        RepositoryError: A list is damaged.
    """
    remote_store, cache = repo.cloud.get_remote_odb(name, "gc", hash_name="md5"), repo.cache.local
    for one in [one for one in remote_store.all() if one.endswith(".dir") and not cache.exists(one)]:
        content = remote_store.fs.cat_file(remote_store.oid_to_path(one))
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != one.removesuffix(".dir"):
            raise RepositoryError(
                f"the DVC remote {name!r} has a damaged list of a folder's files, {one}, so nothing was removed; "
                "delete this object there, and `dvc push` it again from a machine that has it"
            )
        cache.add_bytes(one, content)


def kept_versions(registry: RegistryReader, keep: int, forget_past: bool) -> dict[str, str]:
    """Return {version: why its files have to stay}.

    Args:
        registry: the registry.
        keep: number of newest versions to keep.
        forget_past: do not keep versions for a stage that they had in the past.
    """
    why = {version.number: f"one of the {keep} newest" for version in registry.versions()[-keep:] if keep}
    for stage in sorted(registry.stages_ever()):
        past = {} if forget_past else {one.version: f"was {stage}" for one in registry.holders(stage)}
        why |= {number: reason for number, reason in past.items() if number}
    now = registry.stages().values()
    return why | {one.version: f"is {one.stage}" for one in now if one.version}


def _decide(
    registry: Registry, repos: list["Repo"], keep: int, forget_past: bool, remote: bool, mark: bool
) -> tuple[dict[str, str], set["HashInfo"], list[Version], list[Version]]:
    """Return (kept versions, used objects, versions to remove, kept versions without files).

    The selection is repeated until no promotion happened meanwhile.
    """
    while True:
        state = registry.snapshot()
        kept = kept_versions(state, keep, forget_past)
        used = _used(repos, _revisions(state, kept, forget_past))
        hashes = {one.value for one in used}
        adapters = {version: _adapter_hash(state, version) for version in state.versions()}
        collected, cache = state.collected(), repos[0].cache.local
        removable = [
            one
            for one, adapter in adapters.items()
            if adapter and one.number not in (*kept, *collected) and adapter not in hashes
            if remote or cache.exists(adapter)
        ]
        lost = [one for one, adapter in adapters.items() if one.number in kept and adapter and adapter not in hashes]
        for version in removable if mark else ():
            text = f"The files of {version.tag} were removed: it had no stage, and {keep} newer ones are kept\n"
            registry.git.create_tag(_mark(registry, version), version.commit, text, after=0)
        if registry.last_event() == state.last_event():
            return kept, used, removable, lost
        for version in removable if mark else ():
            registry.git.delete_tag(_mark(registry, version))


def _mark(registry: Registry, version: Version) -> str:
    return COLLECTED.format(name=registry.name, version=version.number)


def _push_marks(registry: Registry, remote: str) -> None:
    """Push the marks that a git remote lacks, also those of an earlier collection that did not end."""
    marks = [tag.name for tag in registry.collected().values()]
    at_remote = registry.git.remote_objects(remote, marks) if marks else {}
    if missing := [mark for mark in marks if mark not in at_remote]:
        registry.git.push_tags(remote, missing)


def _outputs(registry: RegistryReader, version: Version) -> set[str]:
    """Return DVC's hashes of a version's outputs; none for a version that was tagged by hand, without a record."""
    try:
        return set(registry.record(version)["dvc"].values())
    except RegistryError:
        return set()


def _adapter_hash(registry: RegistryReader, version: Version) -> str | None:
    """Return DVC's hash of a version's adapter; None for a version that was tagged by hand, without a record."""
    try:
        return registry.record(version)["dvc"].get("artifacts/adapter")
    except RegistryError:
        return None


def _revisions(registry: RegistryReader, kept: dict[str, str], forget_past: bool) -> list[str]:
    """Return the commits whose files stay: those of kept versions and stages, and those of all other references."""
    fields = "--format=%(objecttype) %(*objecttype) %(objectname) %(*objectname) %(refname)"
    name = re.escape(registry.name)
    registry_tags = re.compile(rf"refs/tags/({name}[@#]|collected/{name}/).*")
    commits = {registry.git.head()}
    for line in registry.git.run("for-each-ref", fields, "refs/heads", "refs/remotes", "refs/tags").splitlines():
        kind, target_kind, commit, target, ref = line.split(" ", 4)
        if not registry_tags.fullmatch(ref) and "commit" in (kind, target_kind):
            commits.add(target or commit)
    commits |= {one.commit for one in registry.stages().values()}
    if not forget_past:
        commits |= {one.commit for stage in registry.stages_ever() for one in registry.holders(stage)}
    commits |= {version.commit for version in registry.versions() if version.number in kept}
    return sorted(commits)


@contextmanager
def _locked(root: Path, excluded: list[Path]) -> Iterator[list["Repo"]]:
    """Open and lock this repository as DVC has it, then its other working trees."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import lock_repo

    git = Git(root)
    trees = [tree / git.prefix for tree in _working_trees(git)]
    folders = [root, *(tree for tree in trees if tree != root and (tree / ".dvc").is_dir())]
    log = logging.getLogger("dvc")
    with warnings.catch_warnings(), ExitStack() as stack:
        # DVC uses a deprecated function of its trie library
        warnings.filterwarnings("ignore", "_NoneStep.value", DeprecationWarning)
        # and warns about outputs without a hash in commits before their first run
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        repos = []
        for folder in folders:
            if any(folder.is_relative_to(one) for one in excluded):
                continue
            repos.append(stack.enter_context(open_repo(folder)))
            try:
                stack.enter_context(lock_repo(repos[-1]))
            except LockError as error:
                raise RepositoryError(
                    f"DVC is busy in {folder}, so nothing was removed; try again when it has finished"
                ) from error
        try:
            yield repos
        except DvcException as error:
            raise RepositoryError(f"DVC cannot find the used objects: {error.__cause__ or error}") from error


def _working_trees(git: Git) -> list[Path]:
    lines = git.run("worktree", "list", "--porcelain").splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


def _used(repos: list["Repo"], revisions: list[str]) -> set["HashInfo"]:
    """Return the objects of all working trees, of these commits and of all experiments.

    A folder whose list of files is neither in the cache nor at a remote is lost already, and is skipped.
    """
    used = [repos[0].used_objs(revs=revisions, all_experiments=True, force=True)]
    used += [repo.used_objs(force=True) for repo in repos[1:]]
    return {one for by_place in used for objects in by_place.values() for one in objects}


def _free_cache(repo: "Repo", used: set["HashInfo"], dry_run: bool) -> Freed:
    places = {id(place): place for _, place in repo.cache.by_scheme() if place}
    freed = [_free(place, used, dry_run) for place in places.values()]
    return Freed(sum(one.objects for one in freed), sum(one.size for one in freed))


def _free_remote(repo: "Repo", name: str, used: set["HashInfo"], dry_run: bool) -> Freed:
    from dvc_data.hashfile.db import get_index

    remote_store = repo.cloud.get_remote_odb(name, "gc", hash_name="md5")
    freed = _free(remote_store, used, dry_run)
    if freed.objects and not dry_run:
        get_index(remote_store).clear()  # DVC's index of the remote's objects
    return freed


def _free(place: "HashFileDB", used: set["HashInfo"], dry_run: bool) -> Freed:
    from dvc_data.hashfile.gc import gc

    hashes = {one.value for one in used if one.name == place.hash_name}
    sizes = [place.fs.size(place.oid_to_path(one)) or 0 for one in place.all() if one not in hashes]
    return Freed(len(sizes) if dry_run or not sizes else gc(place, used), sum(sizes))


def _leftovers(dry_run: bool, git: Git) -> dict[str, int]:
    """Remove the temporary working trees of killed processes, unless it is a dry run; return their sizes in bytes."""
    sizes = {}
    for folder in leftovers(PREFIX):
        sizes[str(folder)] = sum(path.lstat().st_size for path in folder.rglob("*"))
        if not dry_run:
            remove_worktree(git.root, folder / "tree")
            shutil.rmtree(folder)
    if not dry_run:
        git.run("worktree", "prune")
    return sizes
