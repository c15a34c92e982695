"""Versions that wait for a verdict: newer than the holder of the stage, and not judged against it yet.

A refusal leaves no tag, so it is noted at the remote as a reference `refs/peftcore/judged/NAME/VERSION/STATE`, which no
clone fetches. STATE is a digest of what a verdict follows from besides the version: the holder of the stage, the rules
and the approvals. Where one of these changes, the version is judged again.
"""

import hashlib
import json

from flows.errors import RegistryError
from flows.params import Params
from flows.registry.approvals import approvals
from flows.registry.registry import Registry, Version
from flows.registry.signatures import allowed_signers
from flows.runtime.git import GitError

PREFIX = "refs/peftcore/judged"
RULES = ("data", "evaluate", "gate", "merge", "train")
"""Sections of the parameters that a verdict follows from."""


def pending_versions(registry: Registry, params: Params, judged: set[str]) -> list[Version]:
    """Versions above the holder of `gate.stage` whose files are there and that are not in `judged`, newest first.

    judged: references, as from `judged_versions`.
    """
    holder = registry.stages().get(params.gate.stage)
    above = (0, 0, 0) if holder is None or holder.version is None else registry.version(holder.version).parts
    collected = registry.collected()
    newer = [one for one in registry.versions() if one.parts > above and one.number not in collected]
    return [one for one in reversed(newer) if reference(registry, params, one) not in judged]


def judged_versions(registry: Registry, remote: str) -> set[str]:
    """References of the refusals that are noted at a remote. Raises RegistryError if it cannot be reached."""
    try:
        lines = registry.git.run("ls-remote", "--", remote, f"{PREFIX}/{registry.name}/*").splitlines()
    except GitError as error:
        raise RegistryError(f"{remote} does not tell which versions were judged: {error}") from error
    return {line.split("\t", 1)[1] for line in lines}


def note_judged(registry: Registry, params: Params, version: Version, remote: str) -> None:
    """Note at a remote that a version was refused. Raises RegistryError if that fails."""
    name = reference(registry, params, version)
    try:
        registry.git.run("push", "--quiet", "--", remote, f"+{version.commit}:{name}")
    except GitError as error:
        raise RegistryError(
            f"the refusal of {version.tag} could not be noted at {remote} as {name}, so each job would judge it again: "
            f"{error}"
        ) from error


def reference(registry: Registry, params: Params, version: Version) -> str:
    """The name under which a refusal of `version`, as things stand now, is noted."""
    holder = registry.stages().get(params.gate.stage)
    approved = sorted(one.who for one in approvals(registry, version, allowed_signers(params.gate, registry.git.root)))
    rules = params.model_dump(mode="json", include=set(RULES))
    rules["gate"].pop("allowed_signers")  # a file's path; whom it lists shows in the approvals
    state = [params.gate.stage, holder and [holder.commit, holder.event], approved, rules]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    return f"{PREFIX}/{registry.name}/{version.number}/{digest}"
