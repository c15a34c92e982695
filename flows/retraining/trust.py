"""Files that retrainings do not trust, and those that somebody vouches for although drift doubts them.

An unproven file is learnt from but judges nothing; which those are, a version's record says. One whose candidate was
refused is set aside. What is set aside and who was vouched for are lists of this clone, in `reports/retraining`.
"""

import json
from collections.abc import Mapping

from flows.errors import DataError
from flows.params import Params
from flows.paths import Paths
from flows.registry.project_registry import registry_of
from flows.retraining.data import Source, versions_before
from peftcore.files import write_atomically


def read_set_aside(paths: Paths) -> dict[str, str]:
    """{SHA-256: which file it was, and why} of files that retrainings leave out."""
    return json.loads(paths.set_aside.read_text()) if paths.set_aside.exists() else {}


def set_aside(paths: Paths, files: Mapping[str, str], why: str) -> None:
    """Leave files ({name: SHA-256}) out of the retrainings to come."""
    noted = read_set_aside(paths) | {digest: f"{name}: {why}" for name, digest in files.items()}
    write_atomically(paths.set_aside, json.dumps(noted, indent=2) + "\n")


def read_vouched(paths: Paths) -> dict[str, str]:
    """{SHA-256: which file it was} of files that somebody vouches for: they count as proven, whatever drift says."""
    return json.loads(paths.vouched.read_text()) if paths.vouched.exists() else {}


def vouch(params: Params, paths: Paths, name: str) -> list[str]:
    """Let a file, by name or SHA-256, that is set aside or unproven be learnt from and judged by. Returns its SHA-256.

    Raises DataError for any other file.
    """
    noted, vouched = read_set_aside(paths), read_vouched(paths)
    source = Source(params, paths.root, paths.root)
    before = versions_before(registry_of(params, paths.root), params.gate.stage)
    doubted = {digest: file for version in before for file, digest in source.unproven_of(version).items()}
    doubted = {digest: file for digest, file in doubted.items() if digest not in vouched}
    doubted |= {digest: why.partition(": ")[0] for digest, why in noted.items()}
    found = {digest: file for digest, file in doubted.items() if name in (digest, file)}
    if not found:
        there = ", ".join(sorted(set(doubted.values()))) or "none"
        raise DataError(f"{name} is neither set aside nor unproven; these are: {there}")
    write_atomically(paths.vouched, json.dumps(vouched | found, indent=2) + "\n")
    paths.tried.unlink(missing_ok=True)  # with it they may come to something else
    kept = {digest: why for digest, why in noted.items() if digest not in found}
    write_atomically(paths.set_aside, json.dumps(kept, indent=2) + "\n")
    return list(found)
