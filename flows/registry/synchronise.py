"""Fetch the tags of a git remote, which are authoritative for version numbers and stages.

`git fetch --tags` refuses a tag that exists here with another content. This happens if two clones have registered
different versions under one number before either was pushed. The remote's version keeps the number. This clone's
version is registered again under the next free number, with the same files and figures.
"""

import json
import logging
from collections.abc import Collection, Mapping

from flows.errors import RegistryError
from flows.registry.card import CARD, model_card
from flows.registry.reader import APPROVED, RECORD, Version
from flows.registry.registry import Registry
from flows.runtime.locks import exclusive

logger = logging.getLogger(__name__)

FETCHED = "refs/peftcore/fetched"
"""Namespace of a remote's tags while they are compared with the local tags."""


def unpushed_tags(registry: Registry, remote: str) -> list[str]:
    """Return this clone's tags of versions, stages and approvals that a git remote lacks, oldest first.

    Raises GitError if the remote cannot be reached.
    """
    approved = APPROVED.format(name=registry.name, version="*", who="*")
    names = [tag.name for tag in registry.git.tags(f"{registry.name}@*", f"{registry.name}#*", approved)]
    theirs = registry.git.remote_objects(remote, names) if names else {}
    return [name for name in names if name not in theirs]


def synchronise(registry: Registry, remote: str) -> dict[str, str]:
    """Fetch a remote's tags without losing a version that is registered in this clone only.

    An assignment of a stage that this clone never pushed is replaced by the remote's tag of the same name.

    Args:
        registry: the versions of one name.
        remote: a git remote's name or address.

    Returns:
        {old: new} numbers of local versions whose number the remote has given to another version.

    Raises:
        GitError: the remote cannot be reached.
        RegistryError: a version that needs another number has no record; no local tag is replaced then.
    """
    # two processes at once, such as `serve --watch-remote` and a retraining, would both register a displaced version
    with exclusive(registry.git.common_folder() / "peftcore-synchronise.lock"):
        return _synchronise(registry, remote)


def _synchronise(registry: Registry, remote: str) -> dict[str, str]:
    remote_tags = registry.git.fetch_tags(remote, FETCHED)
    local_tags = registry.git.objects("refs/tags/")
    for name, digest in remote_tags.items():
        if name not in local_tags:
            registry.git.set_reference(f"refs/tags/{name}", digest, before=None)
    clashing = {name for name, digest in remote_tags.items() if local_tags.get(name, digest) != digest}
    ours = registry.versions_ever() if clashing else []
    displaced = [version for version in ours if version.tag in clashing and not registry.is_withdrawn(version)]
    # before their tags are replaced, so that an error or a kill in between loses no version
    renumbered = {version.number: _register_again(registry, version, clashing) for version in displaced}
    for version in displaced:
        _drop_stages(registry, version, remote_tags)
    for name in sorted(clashing):
        if name.startswith(f"{registry.name}#"):
            logger.warning("the remote's %s replaces the tag of this clone, which was never pushed", name)
        elif name not in {version.tag for version in displaced}:
            continue  # the registry changes no other tags
        registry.git.set_reference(f"refs/tags/{name}", remote_tags[name], before=local_tags[name])
    return renumbered


def _register_again(registry: Registry, version: Version, clashing: Collection[str]) -> str:
    """Register a version's commit under the next free number, unless an interrupted call has done so.

    clashing: names of tags that differ at the remote. Returns the new number.
    """
    if version.content is None:
        raise RegistryError(
            f"the remote has another {version.tag}, and the version of this clone cannot get another number, because "
            "it has no adapter digest: it was not registered by `peftcore run`. Remove it with "
            f"`git tag --delete {version.tag}`, or tag its commit under a free number first"
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
    logger.warning("the remote has another %s; the version of this clone is %s now", version.tag, number)
    return number


def _drop_stages(registry: Registry, version: Version, theirs: Mapping[str, str]) -> None:
    """Delete the stage tags of a displaced version's old commit, which were never pushed."""
    for tag in registry.git.tags(f"{registry.name}#*"):
        if tag.commit == version.commit and tag.name not in theirs:
            registry.git.delete_tag(tag.name)
            logger.warning("%s was deleted: its version %s was renumbered before the tag was pushed; promote it again",
                           tag.name, version.number)  # fmt: skip
