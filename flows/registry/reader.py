"""Queries on the tags of one registry name: which versions there are, and which version holds which stage.

    NAME@vX.Y.Z      a version; its commit holds the dvc.lock, the metrics, the code and the lineage of its run
    NAME#STAGE#N     the version at that commit got a stage; `!` after STAGE or after the version withdraws it

The tags have GTO's format, so `gto show` and `dvc artifacts get . NAME --stage STAGE` read the same tags. GTO's event
number N counts over all stages of a name.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from flows.errors import RegistryError
from flows.registry.record import check_record
from flows.runtime.git import Git, GitError, Tag

RECORD = "registry/version.json"
"""Path of the lineage record in a version's own commit."""
COLLECTED = "collected/{name}/{version}"
"""Name of the tag that marks a version whose files were removed. GTO does not read this tag."""
APPROVED = "approved/{name}/{version}/{who}"
"""Name of the tag by which a person approves a version. GTO does not read this tag."""
FIRST = (0, 1, 0)

Decides = Callable[[Tag], bool]
"""Returns True if a tag is valid. With a list of signers, a tag is valid if a listed person signed it."""

_ROLLBACK = re.compile(r"becomes \S+ again, in place of (v\d+\.\d+\.\d+)\b")
"""Matches the message of a rollback's tag; the group is the version that lost the stage."""
_TAG = re.compile(
    r"(?P<name>[^@#]+)"
    r"(?:@v(?P<version>\d+\.\d+\.\d+)|#(?P<stage>[A-Za-z0-9][A-Za-z0-9/_-]*))"
    r"(?P<cancelled>!?)(?:#(?P<event>\d+))?"
)


@dataclass(frozen=True)
class Version:
    """A registered version."""

    number: str
    """Such as v0.1.0."""
    tag: str
    """Name of the version's tag, such as tickets@v0.1.0."""
    commit: str
    """Commit of the tag (40 hex digits)."""
    created: int
    """Date of the tag (seconds since 1970)."""
    message: str
    """The tag's message."""

    @property
    def content(self) -> str | None:
        """SHA-256 of the adapter, from the tag's message; None for a version that `gto register` made."""
        match = re.search(r"^Adapter: sha256:([0-9a-f]{64})$", self.message, re.MULTILINE)
        return match.group(1) if match else None

    @property
    def parts(self) -> tuple[int, ...]:
        """The number as integers, for comparisons."""
        return tuple(int(part) for part in self.number.removeprefix("v").split("."))


@dataclass(frozen=True)
class Assignment:
    """A stage that a version got."""

    stage: str
    """Name of the stage, such as champion."""
    version: str | None
    """Number of the version; None if the commit no longer has a version of this name."""
    commit: str
    """Commit of the tag (40 hex digits)."""
    event: int
    """GTO's number N of the event."""
    created: int
    """Date of the tag (seconds since 1970)."""
    message: str
    """The tag's message."""


@dataclass(frozen=True)
class _Event:
    tag: Tag
    version: str | None
    stage: str | None
    cancelled: bool
    number: int


class RegistryReader(ABC):
    """Queries on the versions and stages of one name.

    `Registry` reads git's tags anew for each query. `RegistrySnapshot` answers all queries from one reading, which is
    what a decision needs: all its parts see the same state, and a compare-and-swap can refer to that state.
    """

    def __init__(self, git: Git, name: str, decides: Decides | None, decided: dict[Tag, bool] | None = None) -> None:
        """Read the tags of `name`.

        Args:
            git: the repository.
            name: the project's name.
            decides: test of a tag that gives or withdraws a stage, or withdraws a version. Tags that fail are ignored.
                None: all tags are valid.
            decided: cached results of `decides`, shared between a registry and its snapshots.
        """
        self.git = git
        self.name = name
        self._decides = decides
        self._decided = {} if decided is None else decided

    @abstractmethod
    def tags(self, *patterns: str) -> list[Tag]:
        """Return the annotated tags that match one of the patterns, oldest first."""

    def last_event(self) -> int:
        """Return the highest event number so far. `Registry.assign` takes this number as the state of a decision."""
        return max((event.number for event in self._events()), default=0)

    def last_created(self) -> int:
        """Return the date (seconds since 1970) of the newest tag; 0 if there is none."""
        return max((event.tag.created for event in self._events()), default=0)

    def versions(self) -> list[Version]:
        """Return the registered versions, lowest number first, without withdrawn versions."""
        latest = {event.version: event for event in self._deciding() if event.version}
        alive = [(number, event.tag) for number, event in latest.items() if not event.cancelled]
        versions = [Version(f"v{number}", tag.name, tag.commit, tag.created, tag.message) for number, tag in alive]
        return sorted(versions, key=lambda version: version.parts)

    def versions_ever(self) -> list[Version]:
        """Return the registered versions, lowest number first, withdrawn versions too."""
        tags = {event.version: event.tag for event in self._deciding() if event.version and not event.cancelled}
        versions = [
            Version(f"v{number}", tag.name, tag.commit, tag.created, tag.message) for number, tag in tags.items()
        ]
        return sorted(versions, key=lambda version: version.parts)

    def is_withdrawn(self, version: Version) -> bool:
        """Return True if a tag at the version's own commit withdraws it.

        A tag at another commit withdraws another version of the same number, which two clones have given at once.
        """
        number = version.number.removeprefix("v")
        tags = [event.tag for event in self._deciding() if event.version == number and event.cancelled]
        return any(tag.commit == version.commit for tag in tags)

    def version(self, number: str) -> Version:
        """Return the version with a number such as v0.1.0. Raises RegistryError that lists the versions there are."""
        versions = {version.number: version for version in self.versions()}
        if number not in versions:
            available = ", ".join(versions) or "none yet"
            raise RegistryError(
                f"{self.name} has no version {number}; there is: {available}. "
                "`peftcore registry fetch` gets the versions of a remote, `peftcore run` makes one, and "
                "`peftcore stage register --force` registers the last run again if its tag was deleted"
            )
        return versions[number]

    def registered(self, content: str, evidence: Mapping[str, str]) -> Version | None:
        """Return the version of an adapter with a certain evaluation.

        Args:
            content: SHA-256 of the adapter.
            evidence: {file of the evaluation or the merge: SHA-256}.

        Returns:
            The newest such version whose files were not collected; None if there is none.
        """
        collected = self.collected()
        same = [version for version in reversed(self.versions()) if version.content == content]
        alive = self.records([version for version in same if version.number not in collected])
        return next((version for version, record in alive.items() if record["evidence"] == evidence), None)

    def record(self, version: Version) -> dict[str, Any]:
        """Return a version's lineage record. Raises RegistryError if its commit has no usable record of it."""
        try:
            record = check_record(json.loads(self.git.show(version.commit, RECORD)))
        except (GitError, ValueError, RecursionError) as error:
            raise RegistryError(
                f"{version.tag} has no readable {RECORD}, so it was not registered by `peftcore run`: {error}"
            ) from error
        if (record["name"], record["version"]) != (self.name, version.number):
            raise RegistryError(
                f"{version.tag} is at the commit of {record['name']}@{record['version']}, according to its {RECORD}, "
                f"so it is not a version of its own; delete the tag (`git tag --delete {version.tag}`), or name the "
                "other version"
            )
        return record

    def records(self, versions: Sequence[Version]) -> dict[Version, dict[str, Any]]:
        """Return the records of those versions that have a usable record."""
        records = {}
        for version in versions:
            with suppress(RegistryError):
                records[version] = self.record(version)
        return records

    def stages(self) -> dict[str, Assignment]:
        """Return {stage: its present holder}: the version that got the stage last and did not lose it."""
        numbers, events = self._numbers(), self._deciding()
        last = {(event.stage, event.tag.commit): event for event in events if event.stage}
        versions = {event.version: event for event in events if event.version}
        withdrawn = {event.tag.commit for event in versions.values() if event.cancelled}
        held = [event for event in last.values() if not event.cancelled and event.tag.commit not in withdrawn]
        latest = {event.stage: event for event in sorted(held, key=lambda event: event.number) if event.stage}
        return {stage: _assignment(stage, event, numbers) for stage, event in latest.items()}

    def holders(self, stage: str) -> list[Assignment]:
        """Return all holders of a stage, past ones too, oldest first. Withdrawing tags are not listed."""
        numbers = self._numbers()
        events = [event for event in self._deciding() if event.stage == stage and not event.cancelled]
        return [_assignment(stage, event, numbers) for event in events]

    def stage_changes(self, stage: str) -> list[int]:
        """Return the dates (seconds since 1970) of the tags that gave or withdrew a stage, or withdrew a version."""
        events = self._deciding()
        return [one.tag.created for one in events if one.stage == stage or (one.version and one.cancelled)]

    def withdrawn(self, stage: str) -> dict[str, str]:
        """Return {version: tag and reason} of versions that lost a stage and did not get it again.

        A version loses a stage by a rollback or by a tag that withdraws the stage (`gto deprecate`).
        """
        numbers, reasons = self._numbers(), dict[str, str]()
        for event in self._deciding():
            number = numbers.get(event.tag.commit)
            if event.stage != stage or number is None:
                continue
            if event.cancelled:
                reasons[number] = f"{event.tag.name} withdrew {stage}"
                continue
            reasons.pop(number, None)
            if rolled_back := _ROLLBACK.search(event.tag.message.partition("\n")[0]):
                why = re.search(r"^Reason: (.+)$", event.tag.message, re.MULTILINE)
                reasons[rolled_back[1]] = f"{event.tag.name} rolled it back ({why[1] if why else 'no reason given'})"
        return reasons

    def stages_ever(self) -> set[str]:
        """Return the names of all stages that a version has or had."""
        return {event.stage for event in self._events() if event.stage}

    def next_number(self, minor: bool) -> str:
        """Return the next version's number: one minor step, or one patch step, above the highest number so far."""
        numbers = [tuple(map(int, event.version.split("."))) for event in self._events() if event.version]
        if not numbers:
            return _number(FIRST)
        major, middle, patch = max(numbers)
        return _number((major, middle + 1, 0) if minor else (major, middle, patch + 1))

    def collected(self) -> dict[str, Tag]:
        """Return {version: mark} of the versions whose files `peftcore registry gc --remote` has removed."""
        prefix = COLLECTED.format(name=self.name, version="")
        return {tag.name.removeprefix(prefix): tag for tag in self.tags(f"{prefix}*")}

    def _numbers(self) -> dict[str, str]:
        """Return {commit: version}; if a commit has several versions, the version that its record names."""
        numbers: dict[str, str] = {}
        for version in self.versions():
            if version.commit not in numbers or self.records([version]):
                numbers[version.commit] = version.number
        return numbers

    def _deciding(self) -> list[_Event]:
        """Return the events that count. With a list of signers, an unsigned tag only registers a version."""
        return [event for event in self._events() if self._counts(event)]

    def _counts(self, event: _Event) -> bool:
        if self._decides is None or (event.version and not event.cancelled and event.number == 0):
            return True
        if event.tag not in self._decided:
            self._decided[event.tag] = self._decides(event.tag)
        return self._decided[event.tag]

    def _events(self) -> list[_Event]:
        """Return all events of this name in the order of their numbers.

        Of two events with one number, the withdrawal is the later one, whatever its date: `Git.create_tag` may date a
        tag a little into the future, and the tag that withdraws a version is often made by hand within that second.
        """
        events = []
        for tag in self.tags(f"{self.name}@*", f"{self.name}#*"):
            match = _TAG.fullmatch(tag.name)
            if match:
                number = int(match["event"] or 0)
                events.append(_Event(tag, match["version"], match["stage"], bool(match["cancelled"]), number))
        return sorted(events, key=lambda event: (event.number, event.cancelled, event.tag.created))


class RegistrySnapshot(RegistryReader):
    """The registry as one reading of git's tags saw it."""

    def __init__(
        self, git: Git, name: str, tags: Sequence[Tag], decides: Decides | None, decided: dict[Tag, bool]
    ) -> None:
        """Answer queries from `tags`; the other arguments are those of `RegistryReader`."""
        super().__init__(git, name, decides, decided)
        self._tags = tags

    def tags(self, *patterns: str) -> list[Tag]:
        """Return the tags of the snapshot that match one of the patterns, oldest first."""
        return [tag for tag in self._tags if any(fnmatchcase(tag.name, pattern) for pattern in patterns)]


def _assignment(stage: str, event: _Event, numbers: Mapping[str, str]) -> Assignment:
    tag = event.tag
    return Assignment(stage, numbers.get(tag.commit), tag.commit, event.number, tag.created, tag.message)


def _number(parts: tuple[int, int, int]) -> str:
    return "v" + ".".join(map(str, parts))
