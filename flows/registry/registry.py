"""The model registry: annotated git tags in GTO's format, made safe against concurrent writers.

GTO itself lets two concurrent promotions both succeed, and sorts by whole seconds. Here a promotion is a
compare-and-swap: the caller names the last event number that the decision is based on, and the new tag has exactly
the next number and a later date, so git refuses all writers but the first. `flows.registry.reader` describes the tags.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.errors import RegistryConflict, RegistryError
from flows.registry.reader import (
    APPROVED,
    COLLECTED,
    RECORD,
    Assignment,
    Decides,
    RegistryReader,
    RegistrySnapshot,
    Version,
)
from flows.runtime.git import Git, GitError, Tag

RAN = ("data", "flows", "peftcore", ".peftcore")
"""Folders whose tracked files a version's commit takes from the working tree."""
ADDED = ("params.yaml", "dvc.yaml", ".dvc/config")
"""Files that a version's commit takes from the working tree, tracked or not."""


class Registry(RegistryReader):
    """The versions and stages of one name, and their writers. Each query reads git's tags anew."""

    def __init__(self, git: Git, name: str, signing_key: Path | None = None, decides: Decides | None = None) -> None:
        """Open the registry of one name. For a project, call `flows.registry.project_registry.registry_of`.

        Args:
            git: the repository.
            name: the project's name.
            signing_key: ssh key that signs the tags that are made here; None: tags are not signed.
            decides: test of a tag that gives or withdraws a stage, or withdraws a version. Tags that fail are ignored.
                None: all tags are valid.
        """
        super().__init__(git, name, decides)
        self.signing_key = signing_key

    def tags(self, *patterns: str) -> list[Tag]:
        """Return the annotated tags that git has now and that match one of the patterns, oldest first."""
        return self.git.tags(*patterns)

    def snapshot(self) -> RegistrySnapshot:
        """Return a snapshot of all tags of this name, including approvals and marks of collected versions."""
        patterns = (
            f"{self.name}@*",
            f"{self.name}#*",
            COLLECTED.format(name=self.name, version="*"),
            APPROVED.format(name=self.name, version="*", who="*"),
        )
        return RegistrySnapshot(self.git, self.name, self.git.tags(*patterns), self._decides, self._decided)

    def register(
        self,
        number: str,
        content: str,
        record: Mapping[str, Any],
        contents: Mapping[str, str],
        summary: str,
        add: Sequence[str] = (),
        push_to: str | None = None,
    ) -> Version:
        """Commit a run and tag the commit as a version. The user's branch and index stay unchanged.

        Args:
            number: the version's number, such as v0.1.0.
            content: SHA-256 of the adapter.
            record: the version's lineage record.
            contents: {path: text} to commit beside the record.
            summary: one line for the tag's title.
            add: further files of the working tree to commit, tracked or not.
            push_to: a git remote that has to accept the number.

        Raises:
            RegistryConflict: the number was taken meanwhile, here or at the remote; nothing is registered then.
        """
        title = f"{self.name} {number}: {summary}"
        commit = self.git.snapshot(
            update=RAN,
            add=(*ADDED, *add),
            contents={**contents, RECORD: json.dumps(record, indent=2) + "\n"},
            message=f"Register {title}\n",
        )
        version = self.tag_version(number, commit, title, content)
        if push_to is not None:
            self._push_or_delete(push_to, [version.tag])
        return version

    def tag_version(self, number: str, commit: str, title: str, content: str) -> Version:
        """Tag a commit that holds a record as a version.

        Args:
            number: the version's number.
            commit: the commit.
            title: first line of the tag's message.
            content: SHA-256 of the adapter.

        Raises:
            RegistryConflict: the number is taken.
        """
        tag, message = self.version_tag(number), f"{title}\n\nAdapter: sha256:{content}\n"
        self._create(tag, commit, message, after=self.last_created())
        return self.version(number)

    def version_tag(self, number: str) -> str:
        """Return the name of a version's tag."""
        return f"{self.name}@{number}"

    def assignment_tag(self, stage: str, event: int) -> str:
        """Return the name of the tag that assigns a stage. event: number of the assignment."""
        return f"{self.name}#{stage}#{event}"

    def assign(self, stage: str, version: Version, last_event: int, message: str, push_to: str | None = None) -> str:
        """Give a version a stage, unless the registry has changed since the decision.

        Args:
            stage: the stage.
            version: the version.
            last_event: `RegistryReader.last_event()` of the snapshot that the decision is based on.
            message: the tag's message.
            push_to: a git remote that has to accept the tag. If it refuses, the local tag is deleted again.

        Returns:
            The tag's name.

        Raises:
            RegistryConflict: another writer was faster.
            RegistryError: the version's files were collected, or the remote cannot be reached.
        """
        tag, state = self.assignment_tag(stage, last_event + 1), self.snapshot()
        if state.last_event() != last_event:
            raise self._conflict(tag)
        # without the random part, two clones that promote one version in the same second would make identical tag
        # objects, and both pushes would succeed
        self._create(tag, version.commit, f"{message.rstrip()}\n\nAttempt: {uuid4().hex}\n", state.last_created())
        # read after the tag was made: `gc` marks versions first and reads the tags after that
        if version.number in self.collected():
            self.git.delete_tag(tag)
            raise RegistryError(
                f"the files of {version.tag} were collected (`peftcore registry show {version.number}`), so it cannot "
                f"get a stage; `peftcore reproduce {version.number}` shows if it can be rebuilt"
            )
        if push_to is not None:
            self._push_or_delete(push_to, [version.tag, tag])
        return tag

    def push_version(self, remote: str, version: Version) -> None:
        """Push a version's tag, which reserves its number. Raises RegistryConflict if the remote has another tag."""
        self.push(remote, [version.tag])

    def push_again(self, remote: str, version: Version, held: Assignment) -> None:
        """Push an assignment whose process was killed before its push; does nothing if the remote has it.

        Raises:
            RegistryConflict: the remote has another tag of this name; the local tag is deleted.
        """
        tag = self.assignment_tag(held.stage, held.event)
        try:
            self.push(remote, [version.tag, tag])
        except RegistryConflict:
            self.git.delete_tag(tag)
            raise

    def _push_or_delete(self, remote: str, names: Sequence[str]) -> None:
        """Push tags; if the push fails or is interrupted, delete the last tag in this repository.

        If the remote has accepted the tag nevertheless, the next fetch restores it.
        """
        try:
            self.push(remote, names)
        except BaseException:
            self.git.delete_tag(names[-1])
            raise

    def push(self, remote: str, names: Sequence[str]) -> None:
        """Push tags, all or none.

        If git reports a failure, the remote's tags are read. If the remote has all of the tags, the push succeeded and
        only the remote's answer was lost, so no error is raised.

        Raises:
            RegistryConflict: the remote has another tag of one of these names.
            RegistryError: the remote refused the tags or cannot be reached.
        """
        try:
            self.git.push_tags(remote, names)
        except GitError as error:
            local = self.git.objects("refs/tags/")
            try:
                at_remote = self.git.remote_objects(remote, names)
            except GitError as unreachable:
                raise RegistryError(
                    f"{error}; {unreachable}. It is unknown if {remote} has {names[-1]}; run "
                    f"`peftcore registry fetch {remote}` once the remote can be reached"
                ) from error
            if all(at_remote.get(name) == local[name] for name in names):
                return
            if clashing := [name for name in names if at_remote.get(name, local[name]) != local[name]]:
                raise self._conflict(names[-1], f"the remote {remote} has another {', '.join(clashing)}; ") from error
            raise RegistryError(f"{remote} refused {names[-1]}, so nothing has changed there: {error}") from error

    def _create(self, tag: str, commit: str, message: str, after: int) -> None:
        try:
            self.git.create_tag(tag, commit, message, after=after, key=self.signing_key)
        except GitError as error:
            if self.git.tags(tag):
                raise self._conflict(tag) from error
            raise RegistryError(f"the tag {tag} could not be made: {error}") from error

    def _conflict(self, tag: str, why: str = "") -> RegistryConflict:
        return RegistryConflict(
            f"{tag}: {why}conflict, another registration, promotion or approval of {self.name} was faster; fetch the "
            "remote's tags with `peftcore registry fetch`, look at `peftcore registry list`, then run this again"
        )
