"""Training data of a retraining: the files of rows, and which of them are new.

Every version that a retraining registers has a list of its files with their SHA-256 (`data/NAME.sha256`) in its own
commit. So any clone can recognise new files by their content. The files of a version of `peftcore run` are those of the
source in its commit.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from platform import python_version

from flows.base.hub import DownloadError, download
from flows.data.files import HIDDEN, is_hidden, is_of_rows, row_files, why_unread
from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.registry.reader import RegistryReader, Version
from flows.runtime.git import Git, GitError
from flows.runtime.inputs import check_source_is_tracked, is_committed
from flows.runtime.project import dvc, files_at, get_output
from peftcore.files import sha256, write_atomically

logger = logging.getLogger(__name__)
Files = dict[str, str]
"""{file below data.source: SHA-256}; for another kind of source {its name: Python's version or the hub's revision}."""
UNPRINTABLE = "has a character that is not printable, or not in UTF-8; rename it"
"""Problem of a file name that a list with one name per line cannot hold."""
INCOMING_SOURCE = "data/rows"
"""Suggested data.source with `retrain.incoming`."""


@dataclass(frozen=True)
class Collected:
    """The data of a retraining.

    Attributes:
        files: all files to train on.
        new_files: files that no earlier version was trained on; a retraining starts if there are any.
        new_to_champion: files that the champion was not trained on.
        excluded: files that are left out.
        quarantined: files that an earlier version kept out of evaluation, or whose names match `retrain.untrusted`,
            and that are not trusted files.
        waiting: files that are not used until somebody trusts them (`retrain.untrusted_rows`).
        skipped: {entry of `retrain.incoming` that is not a file of rows: reason}.
    """

    files: Files
    new_files: list[str]
    new_to_champion: list[str]
    excluded: list[str]
    quarantined: list[str]
    waiting: list[str]
    skipped: dict[str, str]


def champion_of(registry: RegistryReader, stage: str) -> Version | None:
    """Return the version that holds the stage; None if the stage is free."""
    holder = registry.stages().get(stage)
    return registry.version(holder.version) if holder and holder.version else None


def versions_before(registry: RegistryReader, stage: str) -> list[Version]:
    """Return the versions whose files are not new: the newest version, and the holder of the stage."""
    versions, champion = registry.versions(), champion_of(registry, stage)
    return [version for version in (versions[-1] if versions else None, champion) if version is not None]


class Source:
    """The files of `data.source` in a working tree."""

    def __init__(self, params: Params, root: Path, tree: Path) -> None:
        """Use the source of `params`. root: the repository; tree: the working tree of the retraining.

        Raises:
            DataError: There are several sources.
        """
        if params.data.mixture:
            raise DataError(
                "data.mixture has several sources, and a retraining needs one, whose new files it finds; put the files "
                "into one folder and name that in data.source"
            )
        self.params, self.root, self.tree = params, root, tree
        self.name = params.data.source
        self.is_path = not self.name.startswith(("stdlib:", "hub:"))
        self.is_hub = self.name.startswith("hub:")
        self._known: dict[str, Files] = {}

    @property
    def place(self) -> Path:
        """Path of the source in the working tree."""
        return self.tree / Path(self.name).expanduser()

    @property
    def manifest(self) -> str:
        """Path of the list of files in a commit."""
        return f"data/{Path(self.name).name.replace(':', '-')}.sha256"

    def collect(
        self,
        before: list[Version],
        champion: Version | None,
        excluded: Mapping[str, str],
        trusted: Collection[str],
    ) -> Collected:
        """Copy the data into the working tree.

        Without `retrain.incoming` the data are those of the tree's commit. With `retrain.incoming` the data are those
        of the newest version, plus the files that arrived later.

        Args:
            before: versions whose files are not new, newest first.
            champion: the holder of the stage.
            excluded: {SHA-256: reason} of files to leave out.
            trusted: SHA-256 of trusted files. They are new to versions that kept them out of evaluation.

        Raises:
            DataError: there are no files, a name cannot be listed, the source cannot take incoming files, or a file to
                leave out is outside the working tree.
        """
        skipped: dict[str, str] = {}
        if self.params.retrain.incoming is not None:
            skipped = self._take_in(self.params.retrain.incoming, before)
        elif self.is_path:
            check_source_is_tracked(Git(self.root), self.name, "a retraining, which uses committed files only,", "HEAD")
            self._pull()
        files = self._files()
        learned = {digest for version in before for digest in self.files_of(version).values()}
        by_champion = set() if champion is None else set(self.files_of(champion).values())
        untrusted = self._untrusted(files, before, learned)
        released = untrusted & set(trusted)
        untrusted -= released
        left_out = sorted(name for name, digest in files.items() if digest in excluded)
        waiting: list[str] = []
        if self.params.retrain.untrusted_rows == "wait":
            unused = untrusted - learned - set(excluded)
            waiting = sorted(name for name, digest in files.items() if digest in unused)
        for name in (*left_out, *waiting):
            del files[name]
        if self.place.is_dir():
            self._remove([*left_out, *waiting])
        quarantined = [name for name, digest in files.items() if digest in untrusted]
        self._check_files(files, left_out, waiting, quarantined)
        return Collected(
            files=files,
            new_files=[name for name, digest in files.items() if digest not in learned - released],
            new_to_champion=[name for name, digest in files.items() if digest not in by_champion - released],
            excluded=left_out,
            quarantined=quarantined,
            waiting=waiting,
            skipped=skipped,
        )

    def _untrusted(self, files: Files, before: list[Version], learned: set[str]) -> set[str]:
        """Return the SHA-256 of files that an earlier version quarantined, and of new ones with untrusted names.

        Args:
            files: files of the source.
            before: earlier versions.
            learned: SHA-256 of the files that these versions were trained on.
        """
        quarantined = {digest for version in before for digest in self.quarantined_of(version).values()}
        # a file by which a version was evaluated was trusted then, perhaps in another clone
        evaluated = learned - quarantined
        by_name = {digest for name, digest in files.items() if self.params.retrain.is_untrusted(name)}
        return quarantined | (by_name - evaluated)

    def _check_files(self, files: Files, left_out: list[str], waiting: list[str], quarantined: list[str]) -> None:
        """Raise DataError if there are no files to train on, or no trusted ones to evaluate on."""
        if not files:
            problem = f"data.source {self.name}: there is no file of rows"
            if self.params.retrain.incoming:
                problem += f", nor in retrain.incoming {self.params.retrain.incoming}"
            if left_out:
                problem += f"; {len(left_out)} are excluded (`peftcore retrain --trust FILE` uses one again)"
            if waiting:
                problem += f"; nobody trusts {', '.join(waiting)} yet (`peftcore retrain --trust FILE`)"
            raise DataError(problem)
        if all(self.params.retrain.is_untrusted(name) and name in quarantined for name in files):
            raise DataError(
                f"nobody trusts {', '.join(files)} yet, so there are no rows to evaluate on; look at one file and give "
                "`peftcore retrain --trust FILE`, or add a file of your own"
            )

    def pinned(self, files: Files) -> str | None:
        """Return a hub's source with its revision, for the stages to read; None for other sources."""
        return f"{self.name.partition('@')[0]}@{files[self.name]}" if self.is_hub else None

    def commit(self, collected: Collected) -> None:
        """Add the data to DVC and commit their list in the tree, on no branch. The version's commit builds on it."""
        files, listing = collected.files, self.tree / self.manifest
        write_atomically(listing, _listing(files))
        tracked = [self.manifest]
        in_dvc = self.is_path and (self.tree / f"{self.name}.dvc").exists()
        if self.params.retrain.incoming is not None or (in_dvc and collected.excluded):
            dvc(self.tree, "add", self.name)
            dvc(self.tree, "push", "--remote", self.params.register.remote, f"{self.name}.dvc")
            tracked += [f"{self.name}.dvc", str(Path(self.name).with_name(".gitignore"))]
        Git(self.tree).commit(tracked, f"Data of a retraining: {len(files)} file{'' if len(files) == 1 else 's'}\n")

    def files_of(self, version: Version) -> Files:
        """Return the files that a version was trained on: its list, or those in its commit if a run registered it.

        No files if the version had another source, or one of the hub, whose revision a run does not record.

        Raises:
            RepositoryError: DVC cannot get the data of the version's commit.
        """
        if version.commit not in self._known:
            self._known[version.commit] = self.listed_files(version) or self._committed_files(version)
        return self._known[version.commit]

    def listed_files(self, version: Version) -> Files:
        """Return the list of files in a version's commit; none if no retraining registered the version."""
        try:
            text = Git(self.root).show(version.commit, self.manifest)
        except GitError:
            return {}
        pairs = (line.split("  ", 1) for line in text.split("\n") if line)
        return {name: digest for digest, name in pairs}

    def _committed_files(self, version: Version) -> Files:
        record = registry_of(self.params, self.root).records([version]).get(version)
        if record is None or record["params"]["data"]["source"] != self.name or self.is_hub:
            return {}
        if not self.is_path:
            return {self.name: f"python {record['software']['python']}"}
        if not is_committed(Git(self.root), self.name, version.commit):
            return {}
        with files_at(self.root, version.commit, [self.name]) as folder:
            return self._files_below(folder / self.name)

    def quarantined_of(self, version: Version) -> Files:
        """Return the files that a version was trained on but not evaluated by."""
        files = self.files_of(version)
        if not files:
            return {}
        record = registry_of(self.params, self.root).record(version)
        data = record["params"]["data"]
        quarantined = data.get("quarantined") or data.get("unproven") or []  # `unproven` is the key of earlier releases
        return {name: digest for name, digest in files.items() if name in quarantined}

    def arrived(self) -> Files:
        """Return the files in `retrain.incoming`, or of a source in this working tree, with untrusted names."""
        incoming = self.params.retrain.incoming
        folder = self.place if incoming is None else self.root / Path(incoming).expanduser()
        if not self.is_path or not folder.is_dir():
            return {}
        files = row_files(folder, self.params.data.kind)
        return {name: sha256(path) for name, path in files.items() if self.params.retrain.is_untrusted(name)}

    def _take_in(self, incoming: str, before: list[Version]) -> dict[str, str]:
        """Copy files of rows from the incoming folder; returns {skipped entry: reason}."""
        folder = (self.root / Path(incoming).expanduser()).resolve()
        if not folder.is_dir():
            raise DataError(f"retrain.incoming {incoming}: there is no folder {folder}; make it, or give another")
        data = (self.tree / "data").resolve()
        is_inside = self.is_path and not Path(self.name).suffix and data in self.place.resolve().parents
        if not is_inside:
            raise DataError(
                f"data.source is {self.name}, but with retrain.incoming it has to be a folder below data/, to which "
                f"incoming files are copied; give {INCOMING_SOURCE}"
            )
        if Git(self.tree).run("ls-files", "--", self.name).strip():
            raise DataError(
                f"data.source {self.name} holds files that git tracks, but incoming files are tracked by DVC; remove "
                f"them from git (`git rm -r --cached {self.name}`), or give another folder"
            )
        shutil.rmtree(self.place, ignore_errors=True)
        newest = next((version for version in before if self.listed_files(version)), None)
        if newest is not None:
            get_output(self.root, newest.commit, self.name, self.place)
        self.place.mkdir(parents=True, exist_ok=True)
        skipped = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if why := _why_not_taken(path, name, self.params.data.kind):
                skipped[name if name.isprintable() else ascii(name)] = why
            elif is_of_rows(path, self.params.data.kind) and path.is_file():
                self._put(path, name)
        return skipped

    def _put(self, path: Path, name: str) -> None:
        """Copy a file to the source's folder.

        A different file of the same name is kept beside it, unless the new file extends it or `retrain.same_name` is
        "replace".
        """
        target = self.place / name
        if target.exists() and sha256(target) != sha256(path) and not _extends(path, target):
            if self.params.retrain.same_name == "replace":
                logger.warning("%s replaces another file of this name, whose rows are removed", name)
            else:
                target = target.with_name(f"{target.stem}-{sha256(path)[:8]}{target.suffix}")
                if not target.exists():
                    logger.warning("%s: there was another file of this name; both are kept, this as %s", name,
                                   target.name)  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a link into DVC's cache
        shutil.copyfile(path, target)

    def _remove(self, names: list[str]) -> None:
        """Delete files of the source from the working tree. Raises DataError, and deletes none, if one is outside."""
        tree, paths = self.tree.resolve(), [self.place / name for name in names]
        if any(not path.parent.resolve().is_relative_to(tree) for path in paths):
            raise DataError(
                f"data.source {self.name} is {self.place.resolve()}, and a retraining deletes nothing outside its own "
                f"working tree, so it cannot leave out {', '.join(names)}; move the rows into a folder below data/, "
                f"such as {INCOMING_SOURCE}, or name their folder in retrain.incoming and give {INCOMING_SOURCE} in "
                "data.source"
            )
        for path in paths:
            path.unlink()

    def _pull(self) -> None:
        """Pull the data that DVC tracks in the tree's commit."""
        pointers = [path.relative_to(self.tree).as_posix() for path in self.tree.glob("data/**/*.dvc")]
        if pointers:
            dvc(self.tree, "pull", *pointers)

    def _files(self) -> Files:
        if self.is_hub:
            return {self.name: self._revision()}
        if not self.is_path:
            return {self.name: f"python {python_version()}"}
        return self._files_below(self.place)

    def _files_below(self, place: Path) -> Files:
        """Return the files of rows at a copy of the source, a file or a folder."""
        files = {place.name: place} if place.is_file() else row_files(place, self.params.data.kind)
        for name in files:
            if not name.isprintable():
                raise DataError(f"data.source {self.name}: the name of {name!a} {UNPRINTABLE}")
        return {name: sha256(path) for name, path in files.items()}

    def _revision(self) -> str:
        """Return the hub's present commit; without a network, the downloaded one."""
        try:
            return download(self.name, "dataset").name
        except DownloadError as error:
            raise DataError(
                f"data.source {self.name}: the download failed: {error}. Check the name and the network"
            ) from error


def _why_not_taken(path: Path, name: str, kind: str) -> str | None:
    """Return why an entry of `retrain.incoming` is not a file of rows; None for files of rows, folders and notes."""
    if path.is_symlink():
        return "it is a link; put the file itself there"
    if path.is_dir() or (not is_of_rows(path, kind) and (path.name.startswith(".") or path.suffix.lower() == ".md")):
        return None
    if not name.isprintable():
        return f"its name {UNPRINTABLE}"
    if not path.is_file():
        return "it is not a regular file"
    if not is_of_rows(path, kind):
        return why_unread(path) or "it is not .jsonl, .csv or .parquet; convert it"
    return HIDDEN if is_hidden(name) else None


def _extends(new: Path, old: Path) -> bool:
    """Return True if a file begins with the whole content of another, as a file does that is only appended to."""
    if old.stat().st_size > new.stat().st_size:
        return False
    with new.open("rb") as long, old.open("rb") as short:
        return all(block == long.read(len(block)) for block in iter(partial(short.read, 1 << 20), b""))


def _listing(files: Files) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))


def has_been_tried(paths: Paths, files: Files) -> bool:
    """Return True if a retraining on exactly these files has come to a verdict."""
    return hashlib.sha256(_listing(files).encode()).hexdigest() in _read_tried(paths)


def note_tried(paths: Paths, files: Files, version: str) -> None:
    """Record that a retraining on these files made `version`, which was judged."""
    tried = _read_tried(paths) | {hashlib.sha256(_listing(files).encode()).hexdigest(): version}
    write_atomically(paths.tried, json.dumps(tried, indent=2) + "\n")


def _read_tried(paths: Paths) -> dict[str, str]:
    return json.loads(paths.tried.read_text(encoding="utf-8")) if paths.tried.exists() else {}
