"""The registry of a project, as its parameters have it: by which key its tags are signed, and whose tags decide."""

from functools import partial
from pathlib import Path

from flows.params import Gate, Params
from flows.registry.registry import Decides, Registry
from flows.registry.signatures import allowed_signers, signature_of, signing_key
from flows.runtime.git import Git, Tag


def registry_of(params: Params, root: Path, sign: bool = False) -> Registry:
    """The registry at `root`. sign: whether the tags made with it are signed, where there is a key.

    Raises RegistryError where the key that is to sign, or the list of signers, is not there.
    """
    git = Git(root)
    key = signing_key(params, root) if sign else None
    return Registry(git, params.project.name, key, deciding_tags(params.gate, git))


def deciding_tags(gate: Gate, git: Git) -> Decides | None:
    """Which tags give or take back a stage: with `gate.allowed_signers`, those that one of them signed; else all."""
    allowed = allowed_signers(gate, git.root)
    return None if allowed is None else partial(_is_signed, git, allowed)


def _is_signed(git: Git, allowed: Path, tag: Tag) -> bool:
    return signature_of(git, tag, allowed).signer is not None
