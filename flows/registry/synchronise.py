"""Take in the tags of a git remote, which decides between clones about version numbers and stages.

`git fetch --tags` refuses a tag that exists here with another content. That happens where two clones have registered a
version under one number before either was pushed. The remote's tag keeps the number; the version of this clone is
registered anew under the next free number, with the same files and figures.
"""

import json
import logging
from collections.abc import Collection, Mapping

from flows.errors import RegistryError
from flows.registry.card import CARD, model_card
from flows.registry.registry import RECORD, Registry, Version
from flows.runtime.locks import exclusive

logger = logging.getLogger(__name__)

FETCHED = "refs/peftcore/fetched"
"""Where a remote's tags are held while they are compared with those here."""


def synchronise(registry: Registry, remote: str) -> dict[str, str]:
    """Take in a remote's tags; no version that is registered here is lost.

    A stage that this clone gave to a version and never pushed makes way for the remote's tag of that name.

    Args:
        registry: the versions of one name.
        remote: a git remote's name or address.

    Returns:
        {old: new} numbers of versions here whose number the remote has given to another version.

    Raises:
        GitError: the remote cannot be reached.
        RegistryError: a version that must make way has no record; no tag of this clone is replaced then.
    """
    # two at once, as of `serve --watch-remote` and a retraining, would each register a displaced version anew
    with exclusive(registry.git.common_folder() / "peftcore-synchronise.lock"):
        return _synchronise(registry, remote)


def _synchronise(registry: Registry, remote: str) -> dict[str, str]:
    theirs = registry.git.fetch_tags(remote, FETCHED)
    ours = registry.git.objects("refs/tags/")
    for name, digest in theirs.items():
        if name not in ours:
            registry.git.set_reference(f"refs/tags/{name}", digest, before=None)
    clashing = {name for name, digest in theirs.items() if ours.get(name, digest) != digest}
    displaced = [version for version in registry.versions() if version.tag in clashing]
    # before their tags are replaced, so that an error or a kill in between loses no version
    renumbered = {version.number: _registered_anew(registry, version, clashing) for version in displaced}
    for name in sorted(clashing):
        if name.startswith(f"{registry.name}#"):
            logger.warning("%s was given here and not pushed; the remote's %s takes its place", name, name)
        elif name not in {version.tag for version in displaced}:
            continue  # a tag of something else is its owner's business
        registry.git.set_reference(f"refs/tags/{name}", theirs[name], before=ours[name])
    for version in displaced:
        _drop_stages(registry, version, theirs)
    return renumbered


def _registered_anew(registry: Registry, version: Version, clashing: Collection[str]) -> str:
    """Register a version's commit again under the next free number, if that was not done before a kill.

    Returns the new number. clashing: tags that the remote has otherwise.
    """
    if version.content is None:
        raise RegistryError(
            f"the remote has another {version.tag}, and the one of this clone has no adapter digest, so it was not "
            f"registered by `peftcore run` and gets no other number; give it up with `git tag --delete {version.tag}`, "
            "or tag its commit under a free number first"
        )
    record = registry.record(version)
    again = registry.registered(version.content, record["evidence"])
    if again is not None and again.tag not in clashing:
        return again.number
    number = registry.next_number(minor=version.number.endswith(".0"))
    record["version"] = number
    title = version.message.split("\n", 1)[0].replace(version.number, number, 1)
    contents = {RECORD: json.dumps(record, indent=2) + "\n"}
    if registry.git.run("ls-tree", "--name-only", version.commit, "--", CARD):
        contents[CARD] = model_card(record)
    commit = registry.git.amended(version.commit, contents, f"Register {title}\n")
    registry.tag_version(number, commit, title, version.content)
    logger.warning("the remote has another %s; the one of this clone is %s now", version.tag, number)
    return number


def _drop_stages(registry: Registry, version: Version, theirs: Mapping[str, str]) -> None:
    """Delete stage tags of a displaced version's old commit, which nobody else has seen."""
    for tag in registry.git.tags(f"{registry.name}#*"):
        if tag.commit == version.commit and tag.name not in theirs:
            registry.git.delete_tag(tag.name)
            logger.warning("%s was of %s before it was renumbered, and was never pushed; promote it again", tag.name,
                           version.number)  # fmt: skip
