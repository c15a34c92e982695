"""Git operations of the registry, by plumbing commands that do not touch the user's branch or index."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from flows.errors import RepositoryError

FALLBACK_IDENTITY = {"name": "peftcore", "email": "peftcore@localhost"}
"""Author of commits if git has no user.name or user.email, as on a new CI machine."""
LOCATIONS = frozenset(
    [
        "GIT_COMMON_DIR",
        "GIT_DIR",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_WORK_TREE",
    ]
)
"""Variables that name a repository in place of the folder. Git sets some of them for its hooks."""


_TAG_FIELDS = (
    *("objecttype", "refname:strip=2", "*objectname", "taggerdate:unix", "taggeremail", "tag"),
    *("contents:signature", "contents"),
)


@dataclass(frozen=True)
class Tag:
    """An annotated tag. created: seconds since 1970; commit: its target; message: without a signature."""

    name: str
    commit: str
    created: int
    message: str
    tagger: str = ""
    """E-mail of the tagger as git was told; only a signature can prove it."""
    made_as: str = ""
    """Name under which the tag was created and signed; a reference to it may have another name."""


class GitError(RepositoryError):
    """A git command that failed; the message is git's."""


class Git:
    """A git repository, seen from the folder of a project: its top, or a folder below with a DVC repository of its own.

    Paths that methods take and return are relative to `root`.

    Raises:
        RepositoryError: `root` is neither, or the git repository has no commit.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            top = Path(self.run("rev-parse", "--show-toplevel").strip())
        except FileNotFoundError as error:
            raise RepositoryError("git is not installed; install it and run this again") from error
        except GitError as error:
            if "not a git repository" not in str(error):  # such as a folder of another user (safe.directory)
                raise
            raise RepositoryError(
                f"{root} is not in a git repository; versions are git tags, so clone the repository, "
                "or run `git init` and make a first commit"
            ) from error
        if top.resolve() != root.resolve() and not (root / ".dvc").is_dir():
            raise RepositoryError(
                f"the pipeline is in {root}, but its git repository begins at {top}; make {root} one of several "
                "projects of the repository with `peftcore init`, or move it to a repository of its own"
            )
        self.top = top
        self.prefix = self.run("rev-parse", "--show-prefix").strip()
        try:
            self.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        except GitError as error:
            raise RepositoryError(
                f"{root} has no git commit yet; run `git add --all` and `git commit`, then run this again"
            ) from error

    def run(self, *arguments: str, stdin: str | None = None, **environment: str) -> str:
        """Run a git command and return its output. Raises GitError with git's message."""
        return self._done(arguments, stdin, environment).stdout

    def run_without_hooks(self, *arguments: str, stdin: str | None = None, **environment: str) -> str:
        """Run a git command as `run` does, for commits and working trees that no user makes: no hook of the user runs.

        A failing prepare-commit-msg or post-checkout hook fails the command, and `--no-verify` skips neither.
        """
        return self.run(*arguments, stdin=stdin, **environment, **_settings({"core.hooksPath": os.devnull}))

    def head(self) -> str:
        """Return the checked-out commit (40 hex digits)."""
        return self.run("rev-parse", "HEAD").strip()

    def common_folder(self) -> Path:
        """Return git's folder, which all working trees of the repository share."""
        return self.root / self.run("rev-parse", "--git-common-dir").strip()

    def main_top(self) -> Path:
        """Return the top folder of the clone's main working tree.

        Returns `top` in a submodule and beside a bare repository, whose git folders are in no working tree.
        """
        folder = self.common_folder().resolve()
        return folder.parent if folder.name == ".git" else self.top

    def show(self, commit: str, path: str) -> str:
        """Return a file's text in `commit`. Raises GitError if it is absent."""
        return self.run("show", f"{commit}:{self.prefix}{path}")

    def snapshot(self, update: Sequence[str], add: Sequence[str], contents: Mapping[str, str], message: str) -> str:
        """Create a commit on top of HEAD that no branch points to; returns its hash.

        Args:
            update: Tracked paths, taken from the working tree with deletions.
            add: Files of the working tree, tracked or not.
            contents: {path: text} to commit regardless of the working tree.
            message: Message of the commit.
        """
        with TemporaryDirectory(prefix="peftcore-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.run("read-tree", "HEAD", **index)
            self._mark_absent_of_sparse_checkout(index)
            tracked = [path for path in update if self._has_checked_out(path, index)]
            if tracked:
                self.run("add", "--update", "--", *tracked, **index)
            if add:
                self._add(add, index)
            tree, parent = self._tree_with(contents, index), self.head()
            return self.run("commit-tree", tree, "-p", parent, stdin=message, **self._identity()).strip()

    def amended(self, commit: str, contents: Mapping[str, str], message: str) -> str:
        """Create a commit like another one, with the same parents and some other files; returns its hash.

        contents: {path: text} of the files to replace.
        """
        with TemporaryDirectory(prefix="peftcore-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.run("read-tree", commit, **index)
            tree = self._tree_with(contents, index)
        parents = self.run("rev-list", "--parents", "--max-count=1", commit).split()[1:]
        options = [word for parent in parents for word in ("-p", parent)]
        return self.run("commit-tree", tree, *options, stdin=message, **self._identity()).strip()

    def _tree_with(self, contents: Mapping[str, str], index: Mapping[str, str]) -> str:
        """Add {path: text} to an index and write its tree; returns the tree's hash."""
        for path, text in contents.items():
            blob = self.run("hash-object", "-w", "--stdin", stdin=text, **index).strip()
            self.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{self.prefix}{path}", **index)
        return self.run("write-tree", **index).strip()

    def commit(self, paths: Sequence[str], message: str) -> None:
        """Commit files of the working tree and nothing else; unchanged files give no commit."""
        self._add(paths, {})
        if self.run("diff", "--cached", "--name-only", "--", *paths).strip():
            self.run_without_hooks("commit", "--quiet", "--no-gpg-sign", "--file=-", "--only", "--", *paths,
                                   stdin=message, **self._identity())  # fmt: skip

    def _add(self, paths: Sequence[str], index: Mapping[str, str]) -> None:
        """Add files of the working tree, also ignored ones and ones outside of a sparse checkout."""
        # earlier releases of git lack the option --sparse
        options = ["--force", "--sparse"] if self._is_sparse() else ["--force"]
        self.run("add", *options, "--", *paths, **index)

    def is_shallow(self) -> bool:
        """Return True for a clone by `git clone --depth`, which lacks earlier commits and most tags."""
        return self.run("rev-parse", "--is-shallow-repository").strip() == "true"

    def _is_sparse(self) -> bool:
        return self.run("config", "--type=bool", "--default=false", "--get", "core.sparseCheckout").strip() == "true"

    def _mark_absent_of_sparse_checkout(self, index: Mapping[str, str]) -> None:
        """Mark the files that the user's sparse checkout leaves out, so that they do not count as deleted."""
        if not self._is_sparse():
            return
        absent = {entry[2:] for entry in self.run("ls-files", "-t", "-z").split("\0") if entry.startswith("S ")}
        known = self.run("ls-files", "-z", **index).split("\0")
        names = "".join(f"{name}\0" for name in known if name in absent)
        self.run("update-index", "--skip-worktree", "-z", "--stdin", stdin=names, **index)

    def _has_checked_out(self, path: str, index: Mapping[str, str]) -> bool:
        """Return True if git tracks a file at or below a path that the sparse checkout does not leave out."""
        entries = self.run("ls-files", "-t", "-z", "--", path, **index).split("\0")
        return any(entry and not entry.startswith("S ") for entry in entries)

    def tags(self, *patterns: str) -> list[Tag]:
        """Return annotated tags whose name matches a pattern, oldest first."""
        fields = "".join(f"%({field})%00" for field in _TAG_FIELDS)  # NUL cannot occur in a message
        refs = [f"refs/tags/{pattern}" for pattern in patterns]
        values = iter(self.run("for-each-ref", f"--format={fields}", *refs).split("\0"))
        rows = zip(*[values] * len(_TAG_FIELDS), strict=False)
        tags = [
            Tag(name, commit, int(created or 0), message.removesuffix(signature), tagger.strip("<>"), made_as)
            for kind, name, commit, created, tagger, made_as, signature, message in rows
            if kind.lstrip("\n") == "tag"
        ]
        return sorted(tags, key=lambda tag: tag.created)

    def create_tag(self, name: str, commit: str, message: str, after: int, key: Path | None = None) -> None:
        """Create an annotated tag with a date later than `after`: now, or one second after `after`.

        Args:
            name: Name of the tag.
            commit: Commit that the tag names.
            message: Message of the tag.
            after: Seconds since 1970.
            key: Ssh key that signs the tag; None for no signature.

        Raises:
            GitError: The name is taken, or git cannot create or sign the tag. If two callers create one name at the
                same time, one of them succeeds.
        """
        date = f"{max(int(time.time()), after + 1)} +0000"
        signing = {} if key is None else _settings({"gpg.format": "ssh", "user.signingkey": str(key)})
        self.run("tag", "--annotate" if key is None else "--sign", "--file=-", "--cleanup=verbatim", name, commit,
                 stdin=message, **self._identity(), **signing, GIT_COMMITTER_DATE=date)  # fmt: skip

    def signer(self, tag: str, allowed: Path) -> str:
        """Return the owner, by the file `allowed`, of the ssh key that signed a tag.

        Raises:
            GitError: Nobody in the file signed the tag.
        """
        # other kinds of signature have other lists of trusted keys
        others = {f"gpg.{kind}.program": "false" for kind in ("openpgp", "x509")}
        settings = _settings({"gpg.format": "ssh", "gpg.ssh.allowedSignersFile": str(allowed), **others})
        output = self._done(["verify-tag", tag], None, settings).stderr
        match = re.search(r'^Good "git" signature for (.+) with \S+ key \S+$', output, re.MULTILINE)
        if match is None:
            raise GitError(f"`git verify-tag` names no signer: {output.strip()}")
        return match.group(1)

    def email(self) -> str | None:
        """Return the e-mail of tags created here; None if git has none."""
        try:
            identity = self.run("var", "GIT_COMMITTER_IDENT", **_settings({"user.useConfigOnly": "true"}))
        except GitError:
            return None
        return identity.partition("<")[2].partition(">")[0]

    def delete_tag(self, name: str) -> None:
        """Delete a tag."""
        self.run("tag", "--delete", name)

    def push_tags(self, remote: str, names: Sequence[str]) -> None:
        """Push tags, all or none. Raises GitError if the remote has another tag of a name, or is unreachable."""
        self._run_for_remote(
            "push", "--atomic", "--", remote, *(f"refs/tags/{name}:refs/tags/{name}" for name in names)
        )

    def remote_objects(self, remote: str, names: Sequence[str]) -> dict[str, str]:
        """Return {tag: hash of its object} at a remote. Raises GitError if the remote is unreachable."""
        references = [f"refs/tags/{name}" for name in names]
        lines = self._run_for_remote("ls-remote", "--tags", "--", remote, *references).splitlines()
        pairs = (line.split("\t", 1) for line in lines)
        return {ref.removeprefix("refs/tags/"): digest for digest, ref in pairs if not ref.endswith("^{}")}

    def objects(self, prefix: str) -> dict[str, str]:
        """Return {reference without `prefix`: hash of its object}; the object of an annotated tag is the tag itself.

        Args:
            prefix: Beginning of the references, with a final slash, such as "refs/tags/".
        """
        lines = self.run("for-each-ref", "--format=%(objectname) %(refname)", prefix).splitlines()
        return {ref.removeprefix(prefix): digest for digest, _, ref in (line.partition(" ") for line in lines)}

    def fetch_tags(self, remote: str, namespace: str) -> dict[str, str]:
        """Fetch every tag of a remote; returns {tag: hash of its object}. Local tags do not change.

        namespace: temporary place of the fetched tags, such as "refs/peftcore/fetched".
        """
        self._run_for_remote("fetch", "--quiet", "--no-tags", "--prune", "--no-write-fetch-head", "--", remote,
                             f"+refs/tags/*:{namespace}/*")  # fmt: skip
        fetched = self.objects(f"{namespace}/")
        self.run("update-ref", "--stdin", stdin="".join(f"delete {namespace}/{name}\n" for name in fetched))
        return fetched

    def set_reference(self, name: str, digest: str, before: str | None) -> None:
        """Set a reference to the object `digest`, as a compare-and-swap.

        Args:
            name: Full name of the reference.
            digest: Hash of the new object.
            before: Expected hash of the present object; None if the reference must not exist.

        Raises:
            GitError: The reference has another value than `before`.
        """
        self.run("update-ref", name, digest, before or "0" * len(digest))

    def _run_for_remote(self, *arguments: str) -> str:
        """Run a git command in the main working tree, from which git resolves a remote with a relative path."""
        return _completed(self.main_top(), arguments, None, {}).stdout

    def _done(
        self, arguments: Sequence[str], stdin: str | None, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return _completed(self.root, arguments, stdin, environment)

    def _identity(self) -> dict[str, str]:
        """Return environment variables with an author for commits, if git has none."""
        missing: dict[str, str] = {}
        for key, value in FALLBACK_IDENTITY.items():
            try:
                self.run("config", f"user.{key}")
            except GitError:
                variables = (f"GIT_AUTHOR_{key.upper()}", f"GIT_COMMITTER_{key.upper()}")
                missing |= {name: value for name in variables if name not in os.environ}
        return missing


def git_output(folder: Path, *arguments: str) -> str:
    """Run a git command in a folder that may be no repository, and return its output.

    Raises:
        GitError: The command failed; the message is git's.
        RepositoryError: git is not installed.
    """
    try:
        return _completed(folder, arguments, None, {}).stdout
    except FileNotFoundError as error:
        raise RepositoryError("git is not installed; install it and run this again") from error


def environment_without_locations() -> dict[str, str]:
    """Return this process's environment without LOCATIONS, so that git uses the repository of its folder."""
    return {name: value for name, value in os.environ.items() if name not in LOCATIONS}


def _completed(
    folder: Path, arguments: Sequence[str], stdin: str | None, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    # without optional locks `git status` does not write the user's index file
    everything = {**environment_without_locations(), "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **environment}
    command = ["git", "-C", str(folder), *arguments]
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as given:
        given.write(stdin or "")
        given.seek(0)
        # If this process is killed, git goes on: it has the whole of `given`, where a pipe would end too early, and
        # with close_fds=False it keeps the locks of flows.runtime.locks until it ends.
        done = subprocess.run(command, env=everything, stdin=None if stdin is None else given, capture_output=True,
                              encoding="utf-8", errors="replace", close_fds=False, check=False)  # fmt: skip
    if done.returncode:
        raise GitError(f"`git {arguments[0]}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done


def _settings(values: Mapping[str, str]) -> dict[str, str]:
    """Return git's configuration for one command as variables, in addition to those of the environment."""
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    variables = {"GIT_CONFIG_COUNT": str(first + len(values))}
    for number, (key, value) in enumerate(values.items(), first):
        variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return variables
