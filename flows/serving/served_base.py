"""Identity of a server's base model: its files and the storage of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flows.base.identity import have_same_base
from flows.errors import RegistryError
from flows.params import Quantization


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
