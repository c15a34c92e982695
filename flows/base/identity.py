"""Identity of a base model: a digest of weights, configuration and tokenizer, not of the software that saved them.

Transformers writes its version into the configuration files, so a digest of the raw files would change with every
update. The digest here leaves out that key. Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.errors import BaseModelError
from peftcore.files import MANIFEST, read_manifest, sha256

SAVED_BY = "transformers_version"
"""Key of configuration files with the version of the software that saved them."""


def base_identity(folder: Path) -> str:
    """Return the SHA-256 (hex) of a base model's folder; the manifest's digests are trusted.

    Raises:
        BaseModelError: A configuration file cannot be read.
    """
    files = read_manifest(folder)
    lines = [f"{_content(folder / name, digest)}  {name}\n" for name, digest in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_base(folder: Path, evaluation: Mapping[str, Any]) -> bool:
    """Return True if the base in `folder` is that of an evaluation's metrics, or of a version's record."""
    if not (folder / MANIFEST).exists():
        return False
    return sha256(folder / MANIFEST) == _manifest(evaluation) or base_identity(folder) == evaluation["base_model"]


def have_same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two evaluations, or records of versions, have the same base.

    Records of earlier releases hold only the digest of the base's manifest.
    """
    return one["base_model"] == other["base_model"] or (
        _manifest(one) == _manifest(other) and not (names_content(one) and names_content(other))
    )


def names_content(evaluation: Mapping[str, Any]) -> bool:
    """Return True if `base_model` is an identity, and False if it is a manifest's digest."""
    return evaluation.get("base_manifest") is not None


def _manifest(evaluation: Mapping[str, Any]) -> str:
    return evaluation.get("base_manifest") or evaluation["base_model"]


def _content(path: Path, digest: str) -> str:
    if path.suffix != ".json":
        return digest
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}); run `peftcore stage fetch` again") from error
    return hashlib.sha256(json.dumps(_without_version(values), sort_keys=True).encode()).hexdigest()


def _without_version(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_version(inner) for key, inner in value.items() if key != SAVED_BY}
    return [_without_version(inner) for inner in value] if isinstance(value, list) else value
