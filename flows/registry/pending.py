"""Versions that wait for a verdict: newer than the holder of the stage, and not yet judged against that holder.

A refusal makes no tag. It is recorded at the remote as a reference `refs/peftcore/judged/NAME/VERSION/STATE`, which no
clone fetches. STATE is a digest of everything else that a verdict depends on: the holder of the stage, the rules and
the approvals. If one of these changes, the version is judged again.
"""

import hashlib
import json

from flows.errors import RegistryError
from flows.params import Params
from flows.registry.approvals import approvals
from flows.registry.reader import RegistryReader, Version
from flows.registry.signatures import allowed_signers
from flows.runtime.git import GitError

PREFIX = "refs/peftcore/judged"
RULES = ("data", "evaluate", "gate", "merge", "train")
"""Sections of the parameters that a verdict depends on."""


def pending_versions(registry: RegistryReader, params: Params, judged: set[str]) -> list[Version]:
    """Return the versions that wait for a verdict, newest first.

    Args:
        registry: the registry.
        params: the rules; `gate.stage` is the stage.
        judged: references of earlier refusals, from `judged_versions`.

    Returns:
        Versions above the stage's holder whose files were not collected and that were not refused in this state.
    """
    holder = registry.stages().get(params.gate.stage)
    holder_number = (0, 0, 0) if holder is None or holder.version is None else registry.version(holder.version).parts
    collected = registry.collected()
    newer = [one for one in registry.versions() if one.parts > holder_number and one.number not in collected]
    return [one for one in reversed(newer) if reference(registry, params, one) not in judged]


def judged_versions(registry: RegistryReader, remote: str) -> set[str]:
    """Return the references of refusals at a remote. Raises RegistryError if the remote cannot be reached."""
    try:
        lines = registry.git.run("ls-remote", "--", remote, f"{PREFIX}/{registry.name}/*").splitlines()
    except GitError as error:
        raise RegistryError(
            f"the judged versions could not be read from {remote} ({error}); check that this machine can reach the "
            "remote"
        ) from error
    return {line.split("\t", 1)[1] for line in lines}


def note_judged(registry: RegistryReader, params: Params, version: Version, remote: str) -> None:
    """Record at a remote that a version was refused. Raises RegistryError if the push fails."""
    name = reference(registry, params, version)
    try:
        registry.git.run("push", "--quiet", "--", remote, f"+{version.commit}:{name}")
    except GitError as error:
        raise RegistryError(
            f"the refusal of {version.tag} could not be recorded at {remote} as {name}, so each job would judge the "
            f"version again: {error}"
        ) from error


def reference(registry: RegistryReader, params: Params, version: Version) -> str:
    """Return the reference under which a refusal of `version` in the present state is recorded."""
    holder = registry.stages().get(params.gate.stage)
    approved = sorted(one.who for one in approvals(registry, version, allowed_signers(params.gate, registry.git.root)))
    rules = params.model_dump(mode="json", include=set(RULES))
    rules["gate"].pop("allowed_signers")  # a file's path; the listed people show in the approvals
    state = [params.gate.stage, holder and [holder.commit, holder.event], approved, rules]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    return f"{PREFIX}/{registry.name}/{version.number}/{digest}"
