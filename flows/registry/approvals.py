"""Approvals of a version by people: annotated tags on the version's commit.

    approved/NAME/vX.Y.Z/WHO

WHO is derived from the approver's e-mail, so tags of different people have different names in all clones. An approval
counts if its tag is on the version's commit and its author did not register the version. With a list of signers
(`gate.allowed_signers`) the author is whoever signed the tag. Without a list the author is the e-mail in the tag.
Anybody can set that e-mail, so such an approval is a note and proves nothing.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from flows.errors import RegistryConflict, RegistryError
from flows.registry.reader import APPROVED, RegistryReader, Version
from flows.registry.registry import Registry
from flows.registry.signatures import VARIABLE, signature_of
from flows.runtime.git import Git, Tag


@dataclass(frozen=True)
class Approval:
    """An approval. who: an e-mail, or the name in the list of signers; created: seconds since 1970."""

    who: str
    note: str
    created: int
    tag: str


def approvals(registry: RegistryReader, version: Version, allowed: Path | None) -> list[Approval]:
    """Return the approvals that count, one per person, oldest first.

    Args:
        registry: the registry.
        version: the version.
        allowed: the list of signers; None if signatures are not required.
    """
    author = registered_by(registry, version, allowed)
    by_person: dict[str, Approval] = {}
    for tag in _approval_tags(registry, version):
        who = _author(registry.git, tag, allowed)
        if who is not None and who != author and tag.commit == version.commit and tag.made_as == tag.name:
            note = tag.message.partition("\n\n")[2].strip()
            by_person.setdefault(who, Approval(who, note, tag.created, tag.name))
    return list(by_person.values())


def unsigned_approvals(registry: RegistryReader, version: Version, allowed: Path) -> list[str]:
    """Return the approval tags that do not count because no listed person signed them."""
    tags = _approval_tags(registry, version)
    return [tag.name for tag in tags if signature_of(registry.git, tag, allowed).signer is None]


def registered_by(registry: RegistryReader, version: Version, allowed: Path | None) -> str | None:
    """Return the author of the version's tag; None if a signature is required and the tag has no valid one."""
    return _author(registry.git, registry.tags(version.tag)[0], allowed)


def approve(
    registry: Registry, version: Version, note: str, allowed: Path | None, push_to: str | None = None
) -> Approval:
    """Approve a version by a tag, signed with the registry's key if there is one.

    Args:
        registry: the registry.
        version: the version.
        note: the reason, which the tag keeps.
        allowed: the list of signers; None if signatures are not required.
        push_to: a git remote that gets the tag; also the tag of an earlier approval with this note that it lacks.

    Raises:
        RegistryError: the note is empty, git has no e-mail, or the approval would not count; no tag is left.
        RegistryConflict: the person has approved the version before, or the remote has another tag of this name.
    """
    git, email = registry.git, registry.git.email()
    if not note.strip():
        raise RegistryError("an approval needs a note, which its tag keeps; give --note")
    if not email:
        raise RegistryError("git does not know who you are; run `git config user.email YOU@EXAMPLE.ORG`")
    if allowed is not None and registry.signing_key is None:
        raise RegistryError(
            f"gate.allowed_signers requires signed approvals; set {VARIABLE} to the path of your ssh key"
        )
    tag = APPROVED.format(name=registry.name, version=version.number, who=_slug(email))
    if git.tags(tag):
        earlier = next((one for one in approvals(registry, version, allowed) if one.tag == tag), None)
        is_same = earlier is not None and earlier.note == " ".join(note.split())
        if earlier is not None and is_same and push_to is not None and not git.remote_objects(push_to, [tag]):
            registry.push(push_to, [version.tag, tag])  # made without a push, or killed before it
            return earlier
        raise RegistryConflict(
            f"{email} has approved {registry.name} {version.number} already; "
            f"`git tag --delete {tag}` removes that approval"
        )
    title = f"{registry.name} {version.number} is approved by {email}"
    git.create_tag(tag, version.commit, f"{title}\n\n{' '.join(note.split())}\n", version.created, registry.signing_key)
    try:
        approval = next((one for one in approvals(registry, version, allowed) if one.tag == tag), None)
        if approval is None:
            raise RegistryError(_reason_not_counted(registry, version, tag, allowed))
        if push_to is not None:
            registry.push(push_to, [version.tag, tag])
    except BaseException:
        git.delete_tag(tag)  # if the remote has the tag nevertheless, the next fetch brings it
        raise
    return approval


def _reason_not_counted(registry: Registry, version: Version, name: str, allowed: Path | None) -> str:
    tag = registry.git.tags(name)[0]
    if allowed is not None and (problem := signature_of(registry.git, tag, allowed).problem):
        return (
            f"an approval with this key does not count: {problem}; add the key to gate.allowed_signers, or use another"
        )
    who = _author(registry.git, tag, allowed)
    if who == registered_by(registry, version, allowed):
        return f"{who} registered {version.tag} and cannot approve it as well; somebody else has to"
    return f"{who} has approved {version.tag} already, by another tag"


def _author(git: Git, tag: Tag, allowed: Path | None) -> str | None:
    return tag.tagger.lower() if allowed is None else signature_of(git, tag, allowed).signer


def _approval_tags(registry: RegistryReader, version: Version) -> list[Tag]:
    return registry.tags(APPROVED.format(name=registry.name, version=version.number, who="*"))


def _slug(email: str) -> str:
    """Return a tag-name part for an e-mail: its readable characters and a digest that makes it unique."""
    readable = re.sub("[^a-z0-9]+", "-", email.lower().partition("@")[0]).strip("-")
    return f"{readable or 'somebody'}-{hashlib.sha256(email.lower().encode()).hexdigest()[:8]}"
