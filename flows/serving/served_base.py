"""Identity of a server's base model: its files and the storage of its weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.base.identity import base_identity, have_same_base
from flows.errors import BaseModelError, RegistryError
from flows.params import Params, Quantization
from flows.registry.reader import RegistryReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedBase:
    """A base model in memory: digest of its files, and storage of its weights."""

    digest: str
    quantization: Quantization
    manifest: str | None = None
    """Digest of the manifest; None if `digest` is that of the manifest, as in records of earlier releases."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "ServedBase":
        """Return the base on which a registered version was evaluated.

        Raises:
            RegistryError: The record does not state the base's storage.
        """
        try:
            quantization = Quantization.model_validate(record["params"].get("quantization"))
        except ValidationError as error:
            raise RegistryError(
                f"the record of {record['name']} {record['version']} does not state how its base was stored: {error}; "
                "register it again with `peftcore run`"
            ) from error
        return cls(record["base_model"], quantization, record.get("base_manifest"))

    def is_same(self, other: "ServedBase") -> bool:
        """Return True if both are the same model in the same storage."""
        one, two = ({"base_model": base.digest, "base_manifest": base.manifest} for base in (self, other))
        return self.quantization == other.quantization and have_same_base(one, two)

    def __str__(self) -> str:
        storage = self.quantization.storage
        stored = "" if storage == "none" else f"dequantised {storage} in "
        return f"base {self.digest[:12]} as {stored}{self.quantization.compute_dtype}"


def load_evaluated_base(folder: Path, registry: RegistryReader, params: Params) -> tuple[Any, Any, ServedBase]:
    """Load a base as in the evaluation of the version that has the stage `gate.stage`.

    Args:
        folder: The base's folder.
        registry: The project's registry.
        params: The project's parameters; they give the storage if no version has the stage.

    Returns:
        The model with dequantised weights, its tokenizer, and its identity.

    Raises:
        BaseModelError: The folder is damaged, or the version was evaluated on another base.
    """
    from flows.base.model import check_base, load_dequantized, load_tokenizer

    holder = registry.stages().get(params.gate.stage)
    manifest = check_base(folder)
    base = ServedBase(base_identity(folder), params.quantization, manifest)
    if holder is not None and holder.version is not None:
        evaluated = ServedBase.of_record(registry.record(registry.version(holder.version)))
        base = replace(base, quantization=evaluated.quantization)
        if not evaluated.is_same(base):
            raise BaseModelError(
                f"{holder.version} was evaluated on {evaluated}, and {folder} holds {base.digest[:12]}; give "
                "--base the folder of the other one"
            )
    logger.info("loading %s", base)
    return load_dequantized(folder, base.quantization), load_tokenizer(folder), base
