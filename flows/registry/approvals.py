"""People's approvals of a version: annotated tags on its commit, which GTO does not read.

    approved/NAME/vX.Y.Z/WHO

WHO is made of the approver's e-mail, so that two clones cannot take each other's name. An approval counts if it is of
the commit that the version has, by somebody other than who registered that; where signers are listed
(`gate.allowed_signers`), only a valid signature says who somebody is. Without such a list an approval is an e-mail that
git was told, which its maker can set to anything: it is a note, and proves nothing.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.errors import RegistryConflict, RegistryError
from flows.registry.registry import Registry, Version
from flows.registry.signatures import VARIABLE, signature_of
from flows.runtime.git import Git, Tag

APPROVED = "approved/{name}/{version}/{who}"


@dataclass(frozen=True)
class Approval:
    """who: an e-mail, or the signer's name in the list of signers; created: seconds since 1970."""

    who: str
    note: str
    created: int
    tag: str


def approvals(registry: Registry, version: Version, allowed: Path | None) -> list[Approval]:
    """The approvals that count, one of each person, the oldest first. allowed: the list of signers, if one is asked."""
    author = registered_by(registry, version, allowed)
    found: dict[str, Approval] = {}
    for tag in _tags(registry.git, registry.name, version.number):
        who = _who(registry.git, tag, allowed)
        if who is not None and who != author and tag.commit == version.commit and tag.made_as == tag.name:
            found.setdefault(who, Approval(who, tag.message.partition("\n\n")[2].strip(), tag.created, tag.name))
    return list(found.values())


def unsigned_approvals(registry: Registry, version: Version, allowed: Path) -> list[str]:
    """Tags of approvals that nobody of the list of signers made, so that they do not count."""
    tags = _tags(registry.git, registry.name, version.number)
    return [tag.name for tag in tags if signature_of(registry.git, tag, allowed).signer is None]


def registered_by(registry: Registry, version: Version, allowed: Path | None) -> str | None:
    """Who made the version's tag; None where signatures are asked for and it has none that counts."""
    return _who(registry.git, registry.git.tags(version.tag)[0], allowed)


def approve(
    registry: Registry, version: Version, note: str, allowed: Path | None, push_to: str | None = None
) -> Approval:
    """Approve a version by a tag, signed with the registry's key if it has one; push_to: a git remote to send it to.

    Raises RegistryError without a note, where git knows no e-mail, or where the approval would not count;
    RegistryConflict if the remote has another. After an error there is no approval here.
    """
    git, email = registry.git, registry.git.email()
    if not note.strip():
        raise RegistryError("an approval needs a note, which its tag keeps; give --note")
    if not email:
        raise RegistryError("git does not know who you are; run `git config user.email YOU@EXAMPLE.ORG`")
    if allowed is not None and registry.signing_key is None:
        raise RegistryError(
            f"gate.allowed_signers asks for signed approvals; set {VARIABLE} to the path of your ssh key"
        )
    tag = APPROVED.format(name=registry.name, version=version.number, who=_slug(email))
    if git.tags(tag):
        raise RegistryConflict(
            f"{email} has approved {registry.name} {version.number} already; `git tag --delete {tag}` takes it back"
        )
    title = f"{registry.name} {version.number} is approved by {email}"
    git.create_tag(tag, version.commit, f"{title}\n\n{' '.join(note.split())}\n", version.created, registry.signing_key)
    try:
        made = next((one for one in approvals(registry, version, allowed) if one.tag == tag), None)
        if made is None:
            raise RegistryError(_why_not(registry, version, tag, allowed))
        if push_to is not None:
            registry.push(push_to, [version.tag, tag])
    except BaseException:
        git.delete_tag(tag)  # where the remote has it all the same, the next fetch brings it
        raise
    return made


def _why_not(registry: Registry, version: Version, tag: str, allowed: Path | None) -> str:
    made = registry.git.tags(tag)[0]
    if allowed is not None and (problem := signature_of(registry.git, made, allowed).problem):
        return (
            f"an approval with this key does not count: {problem}; add the key to gate.allowed_signers, or use another"
        )
    who = _who(registry.git, made, allowed)
    if who == registered_by(registry, version, allowed):
        return f"{who} registered {version.tag} and cannot approve it as well; somebody else has to"
    return f"{who} has approved {version.tag} already, by another tag"


def _who(git: Git, tag: Tag, allowed: Path | None) -> str | None:
    return tag.tagger.lower() if allowed is None else signature_of(git, tag, allowed).signer


def _tags(git: Git, name: str, version: str) -> Iterator[Tag]:
    yield from git.tags(APPROVED.format(name=name, version=version, who="*"))


def _slug(email: str) -> str:
    """Part of a tag's name for an e-mail: its readable part, and a digest that tells any two apart."""
    readable = re.sub("[^a-z0-9]+", "-", email.lower().partition("@")[0]).strip("-")
    return f"{readable or 'somebody'}-{hashlib.sha256(email.lower().encode()).hexdigest()[:8]}"
