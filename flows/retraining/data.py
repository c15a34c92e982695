"""What a retraining learns from: which files of rows there are, and which of them no version has seen.

Every version that a retraining registers holds a list of its files with their SHA-256 (`data/NAME.sha256`) in its own
commit, so that what is new is told by content, on any clone.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from platform import python_version

from flows.errors import DataError
from flows.git import Git, GitError
from flows.params import Params
from flows.paths import Paths
from flows.project import dvc
from flows.promotion.registry import Registry, Version
from peftcore.files import sha256, write_atomically

Files = dict[str, str]
"""{file below data.source: SHA-256}; a source that is no file: {its name: the Python that holds it}."""
SUFFIXES = (".csv", ".jsonl", ".parquet")
"""Of files of rows."""
INCOMING_SOURCE = "data/rows"
"""Where files from `retrain.incoming` are put if data.source does not say."""


@dataclass(frozen=True)
class Collected:
    """files: what this retraining would learn from; fresh: which of them no version before has learnt from; unproven:
    which of them a version before has learnt from but was not judged by, and nobody has vouched for since.
    """

    files: Files
    fresh: list[str]
    set_aside: list[str]
    unproven: list[str]


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

    @property
    def place(self) -> Path:
        return self.tree / self.name

    @property
    def manifest(self) -> str:
        """Where the list of its files is, in a commit."""
        return f"data/{Path(self.name).name.replace(':', '-')}.sha256"

    def collect(self, before: list[Version], set_aside: Mapping[str, str], vouched: Collection[str]) -> Collected:
        """Bring the data into the tree: what the tree's commit holds, and with `retrain.incoming` what the last version
        had and what has come in since.

        before: versions whose data are no news, the newest first. set_aside: {SHA-256: why} of files to leave out.
        vouched: SHA-256 of files that somebody released, which are news to a version that was not judged by them.
        Raises DataError for a source that cannot take what comes in.
        """
        if self.params.retrain.incoming is not None:
            self._take_in(self.params.retrain.incoming, before)
        elif self.is_path:
            self._pull()
        files = self._files()
        left_out = sorted(name for name, digest in files.items() if digest in set_aside)
        for name in left_out:
            del files[name]
            if self.place.is_dir():  # of the tree, which is ours
                (self.place / name).unlink()
        learned = {digest for version in before for digest in self.files_of(version).values()}
        doubted = {digest for version in before for digest in self.unproven_of(version).values()}
        fresh = [name for name, digest in files.items() if digest not in learned or digest in doubted & set(vouched)]
        unproven = [name for name, digest in files.items() if digest in doubted - set(vouched)]
        if not files:
            raise DataError(
                f"data.source {self.name}: there is no file of rows"
                + (f", nor in retrain.incoming {self.params.retrain.incoming}" if self.params.retrain.incoming else "")
                + (f"; {len(left_out)} are set aside (`peftcore retrain --release FILE`)" if left_out else "")
            )
        return Collected(files, fresh, left_out, unproven)

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
        pairs = (line.split("  ", 1) for line in text.splitlines() if line)
        return {name: digest for digest, name in pairs}

    def unproven_of(self, version: Version) -> Files:
        """Those of the files that a version learnt from that it was not judged by."""
        files = self.files_of(version)
        if not files:
            return {}
        record = Registry(Git(self.root), self.params.project.name).record(version)
        unproven = record["params"]["data"].get("unproven") or []
        return {name: digest for name, digest in files.items() if name in unproven}

    def _take_in(self, incoming: str, before: list[Version]) -> None:
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
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
                target = self.place / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)  # it may be a link into DVC's cache
                shutil.copyfile(path, target)

    def _pull(self) -> None:
        """What DVC tracks of the source, as the tree's commit has it."""
        notes = [path.relative_to(self.tree).as_posix() for path in self.tree.glob("data/**/*.dvc")]
        if notes:
            dvc(self.tree, "pull", *notes)

    def _files(self) -> Files:
        if not self.is_path:
            return {self.name: f"python {python_version()}" if self.name.startswith("stdlib:") else self.name}
        if self.place.is_file():
            return {self.place.name: sha256(self.place)}
        found = sorted(path for path in self.place.rglob("*") if path.is_file() and path.suffix in SUFFIXES)
        return {path.relative_to(self.place).as_posix(): sha256(path) for path in found}


def _listing(files: Files) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))


def has_been_tried(paths: Paths, files: Files) -> bool:
    """Whether just these files have come to a version that was there already, of other files."""
    return hashlib.sha256(_listing(files).encode()).hexdigest() in _read_tried(paths)


def note_tried(paths: Paths, files: Files, version: str) -> None:
    """Remember that these files have come to `version`, whose own list cannot say so."""
    tried = _read_tried(paths) | {hashlib.sha256(_listing(files).encode()).hexdigest(): version}
    write_atomically(paths.tried, json.dumps(tried, indent=2) + "\n")


def _read_tried(paths: Paths) -> dict[str, str]:
    return json.loads(paths.tried.read_text()) if paths.tried.exists() else {}
