"""The registry of a project, with the signing key and the list of signers of its parameters."""

from functools import partial
from pathlib import Path

from flows.params import Gate, Params
from flows.registry.reader import Decides
from flows.registry.registry import Registry
from flows.registry.signatures import allowed_signers, signature_of, signing_key
from flows.runtime.git import Git, Tag


def registry_of(params: Params, root: Path, sign: bool = False) -> Registry:
    """Return the registry of the repository at `root`.

    Args:
        params: the project's parameters.
        root: the repository.
        sign: sign the tags that are made with this registry, if there is a key.

    Raises:
        RegistryError: the file of the signing key or of the list of signers does not exist.
    """
    git = Git(root)
    key = signing_key(params, root) if sign else None
    return Registry(git, params.project.name, key, deciding_tags(params.gate, git))


def deciding_tags(gate: Gate, git: Git) -> Decides | None:
    """Return the test for tags that give or withdraw a stage: signed by a listed person; None if all tags count."""
    allowed = allowed_signers(gate, git.root)
    return None if allowed is None else partial(_is_signed, git, allowed)


def _is_signed(git: Git, allowed: Path, tag: Tag) -> bool:
    return signature_of(git, tag, allowed).signer is not None
