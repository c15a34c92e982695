"""Signed tags: an ssh key signs what this machine registers, promotes or approves; a list of keys says who may.

A version's tag holds the digest of its adapter and the commit of its record, so a signature covers both.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from flows.errors import RegistryError
from flows.params import Gate, Params
from flows.runtime.git import Git, GitError, Tag

VARIABLE = "PEFTCORE_SIGNING_KEY"
"""Environment variable with the path of a key; it goes before `register.signing_key`, because a key is a person's."""


@dataclass(frozen=True)
class Signature:
    """Who signed a tag, or why it is not known to be anybody."""

    signer: str | None
    problem: str | None = None


def signing_key(params: Params, root: Path) -> Path | None:
    """The key to sign with, None where there is none. Raises RegistryError if its file is not there."""
    given = os.environ.get(VARIABLE) or params.register.signing_key
    return _existing(root, given, f"register.signing_key (or {VARIABLE})") if given else None


def allowed_signers(gate: Gate, root: Path) -> Path | None:
    """The list of keys that count, None where signatures are not asked for. Raises RegistryError if it is not there."""
    given = gate.allowed_signers
    return _existing(root, given, "gate.allowed_signers") if given else None


def signature_of(git: Git, tag: Tag, allowed: Path) -> Signature:
    """Whose signature a tag has under the very name that it goes by."""
    try:
        signer = git.signer(tag.name, allowed)
    except GitError as error:
        return Signature(None, " ".join(str(error).split()))
    if tag.made_as != tag.name:
        return Signature(None, f"it was signed as {tag.made_as}")
    return Signature(signer)


def _existing(root: Path, given: str, what: str) -> Path:
    path = (root / Path(given).expanduser()).absolute()
    if not path.is_file():
        raise RegistryError(f"{what} is {given}, and there is no file {path}; give the path of one, or null")
    return path
