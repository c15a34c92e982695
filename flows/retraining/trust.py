"""Lists of files of rows: files excluded from retrainings, and files that a person trusts.

A person can trust a file although it exceeded a drift limit. A quarantined file is trained on but kept out of
evaluation; each version's record lists its quarantined files. If the gate refuses the candidate, the file is excluded
from later retrainings. The lists of excluded and of trusted files belong to this clone and are in `reports/retraining`.
"""

import json
from collections.abc import Mapping

from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.retraining.data import Source, versions_before
from flows.retraining.tree import only_one
from peftcore.files import write_atomically


def read_excluded(paths: Paths) -> dict[str, str]:
    """Return {SHA-256: file name and reason} of the excluded files."""
    return json.loads(paths.excluded.read_text(encoding="utf-8")) if paths.excluded.exists() else {}


def exclude(paths: Paths, files: Mapping[str, str], why: str) -> None:
    """Exclude files, {name: SHA-256}, from later retrainings."""
    excluded = read_excluded(paths) | {digest: f"{name}: {why}" for name, digest in files.items()}
    write_atomically(paths.excluded, json.dumps(excluded, indent=2) + "\n")


def read_trusted(paths: Paths) -> dict[str, str]:
    """Return {SHA-256: file name} of the trusted files, which are never quarantined."""
    return json.loads(paths.trusted.read_text(encoding="utf-8")) if paths.trusted.exists() else {}


def trust(params: Params, paths: Paths, name: str) -> list[str]:
    """Use an excluded, quarantined or untrusted new file, for training and for evaluation.

    Args:
        params: the committed parameters.
        paths: the repository.
        name: the file's name or SHA-256.

    Returns:
        The SHA-256 of the file, or of all files with this name.

    Raises:
        DataError: no such file is excluded or quarantined.
        BusyError: a retraining runs, whose verdict changes the same lists at its end.
    """
    with only_one(paths.root):
        return _trust(params, paths, name)


def _trust(params: Params, paths: Paths, name: str) -> list[str]:
    excluded, trusted = read_excluded(paths), read_trusted(paths)
    source = Source(params, paths.root, paths.root)
    before = versions_before(registry_of(params, paths.root).snapshot(), params.gate.stage)
    untrusted = {digest: file for file, digest in source.arrived().items()}
    untrusted |= {digest: file for version in before for file, digest in source.quarantined_of(version).items()}
    untrusted = {digest: file for digest, file in untrusted.items() if digest not in trusted}
    untrusted |= {digest: why.partition(": ")[0] for digest, why in excluded.items()}
    matching = {digest: file for digest, file in untrusted.items() if name in (digest, file)}
    if not matching:
        names = ", ".join(sorted(set(untrusted.values()))) or "none"
        raise DataError(f"{name} is neither excluded nor quarantined; these files are: {names}")
    write_atomically(paths.trusted, json.dumps(trusted | matching, indent=2) + "\n")
    paths.tried.unlink(missing_ok=True)  # the verdict on a set of files may change
    remaining = {digest: why for digest, why in excluded.items() if digest not in matching}
    write_atomically(paths.excluded, json.dumps(remaining, indent=2) + "\n")
    return list(matching)
