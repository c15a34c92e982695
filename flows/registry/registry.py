"""The model registry: annotated git tags in GTO's format, made safe against concurrent writers.

    NAME@vX.Y.Z      a version; its commit holds the dvc.lock, the metrics, the code and the lineage of its run
    NAME#STAGE#N     the version at that commit got a stage; `!` after STAGE or version takes it back

GTO's event number N counts over all stages of a name. GTO itself lets two concurrent promotions both succeed, and
sorts by whole seconds; here a caller says which N it has looked at, and its tag is exactly N + 1 with a later date,
so that git refuses all but the first. `gto show` and `dvc artifacts get . NAME --stage STAGE` read the same tags.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from flows.errors import RegistryConflict, RegistryError
from flows.registry.record import check_record
from flows.runtime.git import Git, GitError, Tag

RECORD = "registry/version.json"
"""Where a version's own commit keeps its lineage record."""
COLLECTED = "collected/{name}/{version}"
"""The tag, which GTO does not read, that marks a version whose files are gone."""
FIRST = (0, 1, 0)
RAN = ("data", "flows", "peftcore")
"""Folders whose tracked files a version's commit takes as they were when it ran."""
ADDED = ("params.yaml", "dvc.yaml", ".dvc/config")
"""Files that it takes, tracked or not."""

Decides = Callable[[Tag], bool]
"""Whether a tag counts where signers are listed: somebody of the list signed it."""

_ROLLBACK = re.compile(r"becomes \S+ again, in place of (v\d+\.\d+\.\d+)\b")
"""How the message of a rollback's tag names the version that lost the stage."""
_TAG = re.compile(
    r"(?P<name>[^@#]+)"
    r"(?:@v(?P<version>\d+\.\d+\.\d+)|#(?P<stage>[A-Za-z0-9][A-Za-z0-9/_-]*))"
    r"(?P<cancelled>!?)(?:#(?P<event>\d+))?"
)


@dataclass(frozen=True)
class Version:
    """number: as in v0.1.0; content: SHA-256 of the adapter; created: seconds since 1970."""

    number: str
    tag: str
    commit: str
    created: int
    message: str

    @property
    def content(self) -> str | None:
        """The adapter's digest, as its tag tells it; None for a version that `gto register` made."""
        found = re.search(r"^Adapter: sha256:([0-9a-f]{64})$", self.message, re.MULTILINE)
        return found.group(1) if found else None

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.number.removeprefix("v").split("."))


@dataclass(frozen=True)
class Assignment:
    """A stage that a version has. version: None if its commit has no version of this name any more."""

    stage: str
    version: str | None
    commit: str
    event: int
    created: int
    message: str


@dataclass(frozen=True)
class _Event:
    tag: Tag
    version: str | None
    stage: str | None
    cancelled: bool
    number: int


class Registry:
    """The versions and stages of one name."""

    def __init__(self, git: Git, name: str, signing_key: Path | None = None, decides: Decides | None = None) -> None:
        """signing_key: of ssh, which signs the tags that are made here. decides: which tags give or take back a stage
        or take back a version; None: all of them. `flows.registry.project_registry` has that of a project.
        """
        self.git = git
        self.name = name
        self.signing_key = signing_key
        self._decides = decides
        self._decided: dict[Tag, bool] = {}

    def last_event(self) -> int:
        """The highest event number so far; pass it to `assign` to say on what a decision was based."""
        return max((event.number for event in self._events()), default=0)

    def versions(self) -> list[Version]:
        """Registered versions, the lowest number first; those that were taken back are left out."""
        latest = {event.version: event for event in self._deciding() if event.version}
        alive = [(number, event.tag) for number, event in latest.items() if not event.cancelled]
        found = [Version(f"v{number}", tag.name, tag.commit, tag.created, tag.message) for number, tag in alive]
        return sorted(found, key=lambda version: version.parts)

    def version(self, number: str) -> Version:
        """One version by its number, as v0.1.0. Raises RegistryError with those that there are."""
        versions = {version.number: version for version in self.versions()}
        if number not in versions:
            there = ", ".join(versions) or "none yet"
            raise RegistryError(
                f"{self.name} has no version {number}; there is: {there}. "
                "`peftcore registry fetch` gets those of a remote, `peftcore run` makes one"
            )
        return versions[number]

    def registered(self, content: str, evidence: Mapping[str, str]) -> Version | None:
        """The version whose adapter has this digest and whose record names this evidence ({file: SHA-256}), if there
        is one whose files are not collected.
        """
        collected = self.collected()
        same = [version for version in reversed(self.versions()) if version.content == content]
        alive = self.records([version for version in same if version.number not in collected])
        return next((version for version, record in alive.items() if record["evidence"] == evidence), None)

    def record(self, version: Version) -> dict[str, Any]:
        """A version's lineage record. Raises RegistryError if its commit has none that can be used, or another's."""
        try:
            record = check_record(json.loads(self.git.show(version.commit, RECORD)))
        except (GitError, ValueError, RecursionError) as error:
            raise RegistryError(
                f"{version.tag} has no readable {RECORD}, so it was not registered by `peftcore run`: {error}"
            ) from error
        if (record["name"], record["version"]) != (self.name, version.number):
            raise RegistryError(
                f"{version.tag} is at the commit of {record['name']}@{record['version']}, as its {RECORD} says, so it "
                f"is no version of its own; delete the tag (`git tag --delete {version.tag}`), or name the other one"
            )
        return record

    def records(self, versions: Sequence[Version]) -> dict[Version, dict[str, Any]]:
        """The records of those of the versions that have a usable one."""
        found = {}
        for version in versions:
            with suppress(RegistryError):
                found[version] = self.record(version)
        return found

    def stages(self) -> dict[str, Assignment]:
        """{stage: what has it now}: of the versions that it was not taken back from, the one that got it last."""
        numbers, events = self._numbers(), self._deciding()
        last = {(event.stage, event.tag.commit): event for event in events if event.stage}
        versions = {event.version: event for event in events if event.version}
        gone = {event.tag.commit for event in versions.values() if event.cancelled}
        held = [event for event in last.values() if not event.cancelled and event.tag.commit not in gone]
        latest = {event.stage: event for event in sorted(held, key=lambda event: event.number) if event.stage}
        return {stage: _assignment(stage, event, numbers) for stage, event in latest.items()}

    def holders(self, stage: str) -> list[Assignment]:
        """Who has had a stage, the first one first; an assignment that was taken back is left out."""
        numbers = self._numbers()
        events = [event for event in self._deciding() if event.stage == stage and not event.cancelled]
        return [_assignment(stage, event, numbers) for event in events]

    def taken_back(self, stage: str) -> dict[str, str]:
        """{version: by which tag, and why} of those that lost a stage by a rollback, or by a tag that takes it back,
        and have not been given it since.
        """
        numbers, found = self._numbers(), dict[str, str]()
        for event in self._deciding():
            number = numbers.get(event.tag.commit)
            if event.stage != stage or number is None:
                continue
            if event.cancelled:
                found[number] = f"{event.tag.name} took {stage} back from it"
                continue
            found.pop(number, None)
            if rolled_back := _ROLLBACK.search(event.tag.message.partition("\n")[0]):
                why = re.search(r"^Reason: (.+)$", event.tag.message, re.MULTILINE)
                found[rolled_back[1]] = f"{event.tag.name} rolled it back ({why[1] if why else 'no reason given'})"
        return found

    def stages_ever(self) -> set[str]:
        """Names of stages that a version has or had."""
        return {event.stage for event in self._events() if event.stage}

    def next_number(self, minor: bool) -> str:
        """The number of the next version: a minor step, or a patch of the highest so far."""
        numbers = [tuple(map(int, event.version.split("."))) for event in self._events() if event.version]
        if not numbers:
            return _number(FIRST)
        major, middle, patch = max(numbers)
        return _number((major, middle + 1, 0) if minor else (major, middle, patch + 1))

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
        """Commit a run and tag that commit as version `number`; the user's branch and index stay as they are.

        content: the adapter's SHA-256. record: the version's lineage. contents: {path: text} to commit beside it.
        add: further files of the working tree, tracked or not. push_to: a git remote that has to agree to the number.
        Raises RegistryConflict if the number was taken meanwhile, here or at the remote; nothing is then registered.
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
        """Tag a commit, which holds a record, as a version. title: the tag's first line; content: as in `register`.

        Raises RegistryConflict if the number is taken.
        """
        self._create(f"{self.name}@{number}", commit, f"{title}\n\nAdapter: sha256:{content}\n")
        return self.version(number)

    def assign(self, stage: str, version: Version, looked_at: int, message: str, push_to: str | None = None) -> str:
        """Give `version` a stage, if nothing has happened since event `looked_at`; returns the tag's name.

        push_to: a git remote that has to agree; its tags decide between clones, and a loser's own tag goes again.
        Raises RegistryConflict if somebody else was first.
        """
        tag = f"{self.name}#{stage}#{looked_at + 1}"
        if self.last_event() != looked_at:
            raise self._conflict(tag)
        # two clones that promote the same version in one second would make the same tag, and both have won
        self._create(tag, version.commit, f"{message.rstrip()}\n\nAttempt: {uuid4().hex}\n")
        # looked at once the tag is there, because `garbage` marks first and looks at the tags after that
        if version.number in self.collected():
            self.git.delete_tag(tag)
            raise RegistryError(
                f"the files of {version.tag} were collected (`peftcore registry show {version.number}`), so it can "
                f"have no stage; `peftcore reproduce {version.number}` tells whether it can be made again"
            )
        if push_to is not None:
            self._push_or_delete(push_to, [version.tag, tag])
        return tag

    def collected(self) -> dict[str, Tag]:
        """{version: the mark} of those whose files `peftcore registry gc --remote` has removed."""
        prefix = COLLECTED.format(name=self.name, version="")
        return {tag.name.removeprefix(prefix): tag for tag in self.git.tags(f"{prefix}*")}

    def push_version(self, remote: str, version: Version) -> None:
        """Push a version's tag, by which its number is its own. Raises RegistryConflict if the remote has another."""
        self.push(remote, [version.tag])

    def push_again(self, remote: str, version: Version, held: Assignment) -> None:
        """Push an assignment that was killed before it could be; where the remote has it, nothing happens.

        Raises RegistryConflict if the remote has another of its name, and the tag here goes again.
        """
        tag = f"{self.name}#{held.stage}#{held.event}"
        try:
            self.push(remote, [version.tag, tag])
        except RegistryConflict:
            self.git.delete_tag(tag)
            raise

    def _push_or_delete(self, remote: str, names: Sequence[str]) -> None:
        """Push tags as `push`; where that fails or is interrupted, delete the last of them here.

        If the remote has it all the same, the next fetch brings it.
        """
        try:
            self.push(remote, names)
        except BaseException:
            self.git.delete_tag(names[-1])
            raise

    def push(self, remote: str, names: Sequence[str]) -> None:
        """Push tags, all or none.

        Whether the remote has the tags is asked of the remote: an answer may be lost after the tags have arrived.

        Raises RegistryConflict if the remote has another tag of one of these names, RegistryError if it refused them or
        cannot be reached.
        """
        try:
            self.git.push_tags(remote, names)
        except GitError as error:
            ours = self.git.objects("refs/tags/")
            try:
                theirs = self.git.remote_objects(remote, names)
            except GitError as unreachable:
                raise RegistryError(
                    f"{error}; {unreachable}. Whether {remote} has {names[-1]} is not known; "
                    f"`peftcore registry fetch {remote}` tells once the remote can be reached"
                ) from error
            if all(theirs.get(name) == ours[name] for name in names):
                return  # only the answer was lost
            if clashing := [name for name in names if theirs.get(name, ours[name]) != ours[name]]:
                raise self._conflict(names[-1], f"the remote {remote} has another {', '.join(clashing)}; ") from error
            raise RegistryError(f"{remote} refused {names[-1]}, so nothing has changed there: {error}") from error

    def _create(self, tag: str, commit: str, message: str) -> None:
        latest = max((event.tag.created for event in self._events()), default=0)
        try:
            self.git.create_tag(tag, commit, message, after=latest, key=self.signing_key)
        except GitError as error:
            if self.git.tags(tag):
                raise self._conflict(tag) from error
            raise RegistryError(f"the tag {tag} could not be made: {error}") from error

    def _conflict(self, tag: str, why: str = "") -> RegistryConflict:
        return RegistryConflict(
            f"{tag}: {why}another registration, promotion or approval of {self.name} came first; "
            "take the remote's in with `peftcore registry fetch`, look at `peftcore registry list`, then run this again"
        )

    def _numbers(self) -> dict[str, str]:
        """{commit: its version}; of several versions at one commit, the one that the commit's record names."""
        found: dict[str, str] = {}
        for version in self.versions():
            if version.commit not in found or self.records([version]):
                found[version.commit] = version.number
        return found

    def _deciding(self) -> list[_Event]:
        """The events that count: where signers are listed, unsigned tags register versions and do nothing else."""
        return [event for event in self._events() if self._counts(event)]

    def _counts(self, event: _Event) -> bool:
        if self._decides is None or (event.version and not event.cancelled and event.number == 0):
            return True
        if event.tag not in self._decided:
            self._decided[event.tag] = self._decides(event.tag)
        return self._decided[event.tag]

    def _events(self) -> list[_Event]:
        """All events of this name, oldest first: by their numbers, because a tag may be dated a little ahead."""
        events = []
        for tag in self.git.tags(f"{self.name}@*", f"{self.name}#*"):
            found = _TAG.fullmatch(tag.name)
            if found:
                number = int(found["event"] or 0)
                events.append(_Event(tag, found["version"], found["stage"], bool(found["cancelled"]), number))
        return sorted(events, key=lambda event: (event.number, event.tag.created))


def _assignment(stage: str, event: _Event, numbers: Mapping[str, str]) -> Assignment:
    """numbers: {commit: version}"""
    tag = event.tag
    return Assignment(stage, numbers.get(tag.commit), tag.commit, event.number, tag.created, tag.message)


def _number(parts: tuple[int, int, int]) -> str:
    return "v" + ".".join(map(str, parts))
