"""What a retraining learns from: which files of rows there are, and which of them no version has seen.

Every version that a retraining registers holds a list of its files with their SHA-256 (`data/NAME.sha256`) in its own
commit, so that what is new is told by content, on any clone.
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
from flows.data.files import is_of_rows, why_unread
from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.registry.registry import Registry, Version
from flows.runtime.git import Git, GitError
from flows.runtime.inputs import check_source_is_tracked
from flows.runtime.project import dvc
from peftcore.files import sha256, write_atomically

logger = logging.getLogger(__name__)
Files = dict[str, str]
"""{file below data.source: SHA-256}; a source that is no file: {its name: the Python that holds it, or the
hub's revision}."""
UNPRINTABLE = "has a character that is not printable, or not in UTF-8; rename it"
"""What is wrong with a name that a list with one name a line, and messages, cannot hold."""
INCOMING_SOURCE = "data/rows"
"""Where files from `retrain.incoming` are put if data.source does not say."""


@dataclass(frozen=True)
class Collected:
    """What a retraining would learn from.

    fresh: files that are a reason to train, since no version before has learnt from them. unlearned: files that the
    champion has not learnt from, whether or not a version that was refused has. unproven: files that a version before
    has learnt from but was not judged by, and nobody has vouched for since. passed_over: {what lies in
    `retrain.incoming` and is not taken: why}.
    """

    files: Files
    fresh: list[str]
    unlearned: list[str]
    set_aside: list[str]
    unproven: list[str]
    passed_over: dict[str, str]


def champion_of(registry: Registry, stage: str) -> Version | None:
    """The version that has the stage."""
    holder = registry.stages().get(stage)
    return registry.version(holder.version) if holder and holder.version else None


def versions_before(registry: Registry, stage: str) -> list[Version]:
    """Versions whose data are no news: the newest, and what has the stage."""
    versions, champion = registry.versions(), champion_of(registry, stage)
    return [version for version in (versions[-1] if versions else None, champion) if version is not None]


class Source:
    """The rows of `data.source` in the working tree `tree`."""

    def __init__(self, params: Params, root: Path, tree: Path) -> None:
        self.params, self.root, self.tree = params, root, tree
        self.name = params.data.source
        self.is_path = not self.name.startswith(("stdlib:", "hub:"))
        self.is_hub = self.name.startswith("hub:")

    @property
    def place(self) -> Path:
        return self.tree / self.name

    @property
    def manifest(self) -> str:
        """Where the list of its files is, in a commit."""
        return f"data/{Path(self.name).name.replace(':', '-')}.sha256"

    def collect(
        self,
        before: list[Version],
        champion: Version | None,
        set_aside: Mapping[str, str],
        vouched: Collection[str],
    ) -> Collected:
        """Bring the data into the tree: what the tree's commit holds, and with `retrain.incoming` what the last version
        had and what has come in since.

        before: versions whose data are no news, the newest first. set_aside: {SHA-256: why} of files to leave out.
        vouched: SHA-256 of files that somebody released, which are news to a version that was not judged by them.
        Raises DataError for a source that cannot take what comes in, or that has a name which no list can hold.
        """
        passed_over: dict[str, str] = {}
        if self.params.retrain.incoming is not None:
            passed_over = self._take_in(self.params.retrain.incoming, before)
        elif self.is_path:
            check_source_is_tracked(
                Git(self.root), self.name, "a retraining, which works on what is committed,", "HEAD"
            )
            self._pull()
        files = self._files()
        left_out = sorted(name for name, digest in files.items() if digest in set_aside)
        for name in left_out:
            del files[name]
            if self.place.is_dir():  # of the tree, which is ours
                (self.place / name).unlink()
        learned = {digest for version in before for digest in self.files_of(version).values()}
        by_champion = set() if champion is None else set(self.files_of(champion).values())
        doubted = {digest for version in before for digest in self.unproven_of(version).values()}
        released = doubted & set(vouched)
        fresh = [name for name, digest in files.items() if digest not in learned or digest in released]
        unlearned = [name for name, digest in files.items() if digest not in by_champion or digest in released]
        unproven = [name for name, digest in files.items() if digest in doubted - set(vouched)]
        if not files:
            raise DataError(
                f"data.source {self.name}: there is no file of rows"
                + (f", nor in retrain.incoming {self.params.retrain.incoming}" if self.params.retrain.incoming else "")
                + (f"; {len(left_out)} are set aside (`peftcore retrain --release FILE`)" if left_out else "")
            )
        return Collected(files, fresh, unlearned, left_out, unproven, passed_over)

    def pinned(self, files: Files) -> str | None:
        """Return a hub's source with the revision that was found, which the stages are to read; None for other ones."""
        return f"{self.name.partition('@')[0]}@{files[self.name]}" if self.is_hub else None

    def keep(self, collected: Collected) -> None:
        """Put the data into DVC and their list into a commit, on no branch, that the version will stand on."""
        files, listing = collected.files, self.tree / self.manifest
        write_atomically(listing, _listing(files))
        tracked = [self.manifest]
        is_dvcs = self.is_path and (self.tree / f"{self.name}.dvc").exists()
        if self.params.retrain.incoming is not None or (is_dvcs and collected.set_aside):
            dvc(self.tree, "add", self.name)
            dvc(self.tree, "push", "--remote", self.params.register.remote, f"{self.name}.dvc")
            tracked += [f"{self.name}.dvc", str(Path(self.name).with_name(".gitignore"))]
        Git(self.tree).commit(tracked, f"Data of a retraining: {len(files)} files\n")

    def files_of(self, version: Version) -> Files:
        """The files that a version learnt from; none if no retraining registered it."""
        try:
            text = Git(self.root).show(version.commit, self.manifest)
        except GitError:
            return {}
        pairs = (line.split("  ", 1) for line in text.split("\n") if line)
        return {name: digest for digest, name in pairs}

    def unproven_of(self, version: Version) -> Files:
        """Those of the files that a version learnt from that it was not judged by."""
        files = self.files_of(version)
        if not files:
            return {}
        record = Registry(Git(self.root), self.params.project.name).record(version)
        data = record["params"]["data"]
        unproven = data.get("quarantined") or data.get("unproven") or []  # the key of earlier releases
        return {name: digest for name, digest in files.items() if name in unproven}

    def _take_in(self, incoming: str, before: list[Version]) -> dict[str, str]:
        """Take files of rows out of the folder; returns what is passed over, and why."""
        folder = (self.root / Path(incoming).expanduser()).resolve()
        if not folder.is_dir():
            raise DataError(f"retrain.incoming {incoming}: there is no folder {folder}; make it, or give another")
        inside = self.is_path and self.name.startswith("data/") and not Path(self.name).suffix
        if not inside:
            raise DataError(
                f"data.source is {self.name}, but with retrain.incoming it has to be a folder below data/ that the "
                f"files are kept in; give {INCOMING_SOURCE}"
            )
        if Git(self.tree).run("ls-files", "--", self.name).strip():
            raise DataError(
                f"data.source {self.name} holds files that git tracks, and what comes in is kept by DVC; take them out "
                f"of git (`git rm -r --cached {self.name}`), or give another folder"
            )
        shutil.rmtree(self.place, ignore_errors=True)
        newest = next((version for version in before if self.files_of(version)), None)
        if newest is not None:
            dvc(self.root, "get", str(self.root), self.name, "--rev", newest.commit, "--out", str(self.place))
        self.place.mkdir(parents=True, exist_ok=True)
        passed_over = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if why := _why_not_taken(path, name):
                passed_over[name if name.isprintable() else ascii(name)] = why
            elif is_of_rows(path) and path.is_file():
                self._put(path, name)
        return passed_over

    def _put(self, path: Path, name: str) -> None:
        """Copy a file to where the data are kept. One of a name that another had before stands beside that one, unless
        it goes on from that one or `retrain.same_name` says to replace it.
        """
        target = self.place / name
        if target.exists() and sha256(target) != sha256(path) and not _goes_on(path, target):
            if self.params.retrain.same_name == "replace":
                logger.warning("%s: it takes the place of another file of this name, whose rows are gone", name)
            else:
                target = target.with_name(f"{target.stem}-{sha256(path)[:8]}{target.suffix}")
                if not target.exists():
                    logger.warning("%s: there was another file of this name; both are kept, this as %s", name,
                                   target.name)  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a link into DVC's cache
        shutil.copyfile(path, target)

    def _pull(self) -> None:
        """What DVC tracks of the source, as the tree's commit has it."""
        notes = [path.relative_to(self.tree).as_posix() for path in self.tree.glob("data/**/*.dvc")]
        if notes:
            dvc(self.tree, "pull", *notes)

    def _files(self) -> Files:
        if self.is_hub:
            return {self.name: self._revision()}
        if not self.is_path:
            return {self.name: f"python {python_version()}"}
        if self.place.is_file():
            files = {self.place.name: self.place}
        else:
            found = sorted(path for path in self.place.rglob("*") if path.is_file() and is_of_rows(path))
            files = {path.relative_to(self.place).as_posix(): path for path in found}
        for name in files:
            if not name.isprintable():
                raise DataError(f"data.source {self.name}: the name of {name!a} {UNPRINTABLE}")
        return {name: sha256(path) for name, path in files.items()}

    def _revision(self) -> str:
        """The commit that the hub has now, by its snapshot; without a network the one that is here."""
        try:
            return download(self.name, "dataset").name
        except DownloadError as error:
            raise DataError(
                f"data.source {self.name}: the download failed: {error}. Check the name and the network"
            ) from error


def _why_not_taken(path: Path, name: str) -> str | None:
    """Why something in `retrain.incoming` is no file of rows; None for one that is, and for folders and notes."""
    if path.is_symlink():
        return "it is a link; put the file itself there"
    if path.is_dir() or (not is_of_rows(path) and (path.name.startswith(".") or path.suffix.lower() == ".md")):
        return None
    if not name.isprintable():
        return f"its name {UNPRINTABLE}"
    if not path.is_file():
        return "it is no plain file"
    if not is_of_rows(path):
        return why_unread(path) or "it is no .jsonl, .csv or .parquet; convert it to one"
    return None


def _goes_on(new: Path, old: Path) -> bool:
    """Whether a file begins with all that another holds, as one that is only added to."""
    if old.stat().st_size > new.stat().st_size:
        return False
    with new.open("rb") as long, old.open("rb") as short:
        return all(block == long.read(len(block)) for block in iter(partial(short.read, 1 << 20), b""))


def _listing(files: Files) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))


def has_been_tried(paths: Paths, files: Files) -> bool:
    """Whether a retraining on just these files has come to a verdict."""
    return hashlib.sha256(_listing(files).encode()).hexdigest() in _read_tried(paths)


def note_tried(paths: Paths, files: Files, version: str) -> None:
    """Remember that these files have come to `version`, which was judged."""
    tried = _read_tried(paths) | {hashlib.sha256(_listing(files).encode()).hexdigest(): version}
    write_atomically(paths.tried, json.dumps(tried, indent=2) + "\n")


def _read_tried(paths: Paths) -> dict[str, str]:
    return json.loads(paths.tried.read_text()) if paths.tried.exists() else {}
