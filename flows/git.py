"""The few git operations that the registry needs, by plumbing: nothing here touches the user's branch or index."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import RepositoryError

FALLBACK_IDENTITY = {"name": "peftcore", "email": "peftcore@localhost"}
"""Who commits where git has no user.name or user.email, as on a fresh CI machine."""


@dataclass(frozen=True)
class Tag:
    """An annotated tag. created: seconds since 1970; commit: what it points to."""

    name: str
    commit: str
    created: int
    message: str


class GitError(RepositoryError):
    """A git command that failed; the message is git's."""


class Git:
    """One repository, at its top folder `root`."""

    def __init__(self, root: Path) -> None:
        """Raises RepositoryError if `root` is not the top of a git repository with a commit."""
        self.root = root
        try:
            top = Path(self.run("rev-parse", "--show-toplevel").strip())
        except FileNotFoundError as error:
            raise RepositoryError("git is not installed; install it and run this again") from error
        except GitError as error:
            raise RepositoryError(
                f"{root} is not in a git repository; versions are git tags, so clone the repository, "
                "or run `git init` and make a first commit"
            ) from error
        if top.resolve() != root.resolve():
            raise RepositoryError(
                f"the pipeline is in {root}, but its git repository begins at {top}; "
                "registering needs both in one folder, so move the pipeline to a repository of its own"
            )
        try:
            self.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        except GitError as error:
            raise RepositoryError(
                f"{root} has no git commit yet; run `git add --all` and `git commit`, then run this again"
            ) from error

    def run(self, *arguments: str, stdin: str | None = None, **environment: str) -> str:
        """Run one git command and return its output. Raises GitError with git's reason."""
        # without optional locks `git status` leaves the user's index file as it is
        everything = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **environment}
        command = ["git", "-C", str(self.root), *arguments]
        done = subprocess.run(command, env=everything, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GitError(f"`git {arguments[0]}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def head(self) -> str:
        """The commit that is checked out (40 hex digits)."""
        return self.run("rev-parse", "HEAD").strip()

    def uncommitted(self, leaving_out: Sequence[str] = ()) -> list[str]:
        """Tracked files that differ from HEAD, and new ones that are not ignored; sorted."""
        excluded = [f":(exclude){name}" for name in leaving_out]
        lines = self.run("status", "--porcelain", "-z", "--no-renames", "--", ".", *excluded).split("\0")
        return sorted(line[3:] for line in lines if line)

    def show(self, commit: str, path: str) -> str:
        """One file's text as it is in `commit`. Raises GitError if it is not there."""
        return self.run("show", f"{commit}:{path}")

    def snapshot(self, update: Sequence[str], add: Sequence[str], contents: Mapping[str, str], message: str) -> str:
        """Make a commit on top of HEAD that no branch points to; returns its hash.

        update: tracked paths taken as they are in the working tree, deletions too.
        add: files taken from the working tree, tracked or not.
        contents: {path: text} put into the commit whatever the working tree holds.
        """
        with TemporaryDirectory(prefix="peftcore-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.run("read-tree", "HEAD", **index)
            tracked = [path for path in update if self.run("ls-files", "--", path, **index)]
            if tracked:
                self.run("add", "--update", "--", *tracked, **index)
            if add:
                self.run("add", "--force", "--", *add, **index)
            for path, text in contents.items():
                blob = self.run("hash-object", "-w", "--stdin", stdin=text, **index).strip()
                self.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", **index)
            tree = self.run("write-tree", **index).strip()
            parent = self.head()
            return self.run("commit-tree", tree, "-p", parent, stdin=message, **self._identity()).strip()

    def tags(self, *patterns: str) -> list[Tag]:
        """Annotated tags whose name matches one of the patterns, oldest first."""
        fields = "%(objecttype)%1f%(refname:strip=2)%1f%(*objectname)%1f%(taggerdate:unix)%1f%(contents)%1e"
        refs = [f"refs/tags/{pattern}" for pattern in patterns]
        records = self.run("for-each-ref", f"--format={fields}", *refs).split("\x1e")
        rows = [record.lstrip("\n").split("\x1f") for record in records if record.strip()]
        tags = [Tag(row[1], row[2], int(row[3]), row[4]) for row in rows if row[0] == "tag"]
        return sorted(tags, key=lambda tag: tag.created)

    def create_tag(self, name: str, commit: str, message: str, after: int) -> None:
        """Make an annotated tag that is dated later than `after` (seconds since 1970).

        Raises GitError if the name is taken: git makes a new reference or refuses, never both for two callers.
        """
        date = f"{max(int(time.time()), after + 1)} +0000"
        self.run("tag", "--annotate", "--file=-", "--cleanup=verbatim", name, commit,
                 stdin=message, **self._identity(), GIT_COMMITTER_DATE=date)  # fmt: skip

    def delete_tag(self, name: str) -> None:
        self.run("tag", "--delete", name)

    def push_tags(self, remote: str, names: Sequence[str]) -> None:
        """Send tags, all or none. Raises GitError if the remote has another of a name, or cannot be reached."""
        self.run("push", "--atomic", remote, *(f"refs/tags/{name}:refs/tags/{name}" for name in names))

    def _identity(self) -> dict[str, str]:
        """Names for a commit where neither git's configuration nor the environment has one."""
        missing: dict[str, str] = {}
        for key, value in FALLBACK_IDENTITY.items():
            try:
                self.run("config", f"user.{key}")
            except GitError:
                variables = (f"GIT_AUTHOR_{key.upper()}", f"GIT_COMMITTER_{key.upper()}")
                missing |= {name: value for name in variables if name not in os.environ}
        return missing
