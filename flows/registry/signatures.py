"""Signed tags. An ssh key signs the registrations, promotions and approvals of this machine.

A list of keys (`gate.allowed_signers`) names the people whose signatures count. A version's tag holds the digest of the
adapter and points to the commit of the record, so a signature covers both.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from flows.errors import RegistryError
from flows.params import Gate, Params
from flows.runtime.git import Git, GitError, Tag

VARIABLE = "PEFTCORE_SIGNING_KEY"
"""Environment variable with a key's path. It overrides `register.signing_key`, because a key belongs to a person."""


@dataclass(frozen=True)
class Signature:
    """The signer of a tag, or the problem with its signature."""

    signer: str | None
    problem: str | None = None


def signing_key(params: Params, root: Path) -> Path | None:
    """Return the path of the signing key; None if none is configured. Raises RegistryError if the file is missing."""
    path = os.environ.get(VARIABLE) or params.register.signing_key
    return _existing(root, path, f"register.signing_key (or {VARIABLE})") if path else None


def allowed_signers(gate: Gate, root: Path) -> Path | None:
    """Return the list of signers; None if signatures are not required. Raises RegistryError if the file is missing."""
    path = gate.allowed_signers
    return _existing(root, path, "gate.allowed_signers") if path else None


def signature_of(git: Git, tag: Tag, allowed: Path) -> Signature:
    """Return the signature of a tag, which is valid only under the tag's present name."""
    try:
        signer = git.signer(tag.name, allowed)
    except GitError as error:
        return Signature(None, " ".join(str(error).split()))
    if tag.made_as != tag.name:
        return Signature(None, f"it was signed as {tag.made_as}")
    return Signature(signer)


def _existing(root: Path, value: str, key: str) -> Path:
    path = (root / Path(value).expanduser()).absolute()
    if not path.is_file():
        raise RegistryError(f"{key} is {value}, but the file {path} does not exist; give a file's path, or null")
    return path
