"""Identity of a server's base model: its files, the storage of its weights, and its calibration."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.base.calibrated import calibrated_identity, trained_base
from flows.base.identity import base_identity, have_same_base
from flows.errors import BaseModelError, RegistryError
from flows.params import Params, Quantization
from flows.params.train import WITHOUT_CHAT
from flows.paths import Paths
from flows.registry.reader import RegistryReader, Version
from flows.registry.registered_files import files_of
from peftcore.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedBase:
    """A base model in memory: digest of its files, and storage of its weights."""

    digest: str
    quantization: Quantization
    manifest: str | None = None
    """Digest of the manifest; None if `digest` is that of the manifest, as in records of earlier releases."""
    calibrated: str | None = None
    """Identity of the calibrated base; None without calibration."""

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
        return cls(record["base_model"], quantization, record.get("base_manifest"), record.get("calibrated_base"))

    def is_same(self, other: "ServedBase") -> bool:
        """Return True if both are the same model in the same storage; compute dtype `auto` fits every other one."""
        one, two = ({"base_model": base.digest, "base_manifest": base.manifest} for base in (self, other))
        stored, others = self.quantization.uncalibrated, other.quantization.uncalibrated
        if "auto" in (stored.compute_dtype, others.compute_dtype):
            stored = stored.model_copy(update={"compute_dtype": others.compute_dtype})
        return stored == others and self.calibrated == other.calibrated and have_same_base(one, two)

    def __str__(self) -> str:
        storage = self.quantization.storage
        dtype = self.quantization.compute_dtype
        stored = dtype if storage == "none" else f"dequantised {storage} in {dtype}"
        calibrated = "" if self.calibrated is None else f", calibrated {self.calibrated[:12]},"
        return f"base {self.digest[:12]}{calibrated} as {stored}"


def load_evaluated_base(
    folder: Path, paths: Paths, registry: RegistryReader, params: Params
) -> tuple[Any, Any, ServedBase]:
    """Load a base as in the evaluation of the version that has the stage `gate.stage`.

    A version's calibrated base is taken from the working tree, or else from DVC's cache or remote.

    Args:
        folder: The folder of the base as fetched.
        paths: The project's files.
        registry: The project's registry.
        params: The project's parameters; they give the storage if no version has the stage.

    Returns:
        The model with dequantised weights, its tokenizer, and its identity.

    Raises:
        BaseModelError: The folder is damaged, the version was evaluated on another base, or the project's objective
            makes no model that answers chats.
        RegistryError: The version's calibrated base is not what was registered.
        RepositoryError: The version's calibrated base is neither in the cache nor on the remote.
    """
    from flows.base.folder import check_base, load_tokenizer
    from flows.base.model import load_for_serving

    check_generates(params.train.objective, f"the project's train.objective is {params.train.objective}")
    holder = registry.stages().get(params.gate.stage)
    manifest = check_base(folder)
    base = ServedBase(base_identity(folder), params.quantization, manifest)
    with ExitStack() as stack:
        weights = folder
        if holder is not None and holder.version is not None:
            version = registry.version(holder.version)
            objective = registry.record(version)["params"]["train"].get("objective", "sft")
            check_generates(objective, f"{version.number} was trained by train.objective {objective}")
            evaluated = ServedBase.of_record(registry.record(version))
            base = replace(base, quantization=evaluated.quantization, calibrated=evaluated.calibrated)
            if not evaluated.is_same(base):
                raise BaseModelError(
                    f"{holder.version} was evaluated on {evaluated}, and {folder} holds {base.digest[:12]}; give "
                    "--base the folder of the other one"
                )
            if evaluated.calibrated is not None:
                weights = _calibrated(stack, paths, registry, version, evaluated.calibrated)
        elif params.quantization.is_calibrated:
            weights = trained_base(paths, params.quantization)
            base = replace(base, calibrated=calibrated_identity(weights))
        if weights != folder:
            check_base(weights)
        logger.info("loading %s", base)
        return load_for_serving(weights, base.quantization), load_tokenizer(folder), base


def _calibrated(stack: ExitStack, paths: Paths, registry: RegistryReader, version: Version, identity: str) -> Path:
    """Return the folder of a version's calibrated base."""
    if calibrated_identity(paths.calibrated) == identity:
        return paths.calibrated
    return stack.enter_context(files_of(paths, registry, version, [paths.calibrated])).calibrated


def check_generates(objective: str, subject: str) -> None:
    """Raise ConfigError if models of an objective answer no chats. subject: beginning of the message."""
    if objective in WITHOUT_CHAT:
        raise ConfigError(
            f"{subject}, and only models that answer chats are served; load the model in your own program, as the "
            "version's model card shows"
        )


def load_given_base(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load a base outside of a project; a calibrated base is dequantised to the dtype of its calibration.

    Args:
        folder: The base's folder.
        dtype: Dtype of the weights; "auto" for a calibrated base.

    Raises:
        BaseModelError: The calibrated base is damaged.
        CheckpointError: The folder holds no base.
        ConfigError: A dtype is given for a calibrated base, or the base generates no text.
    """
    from flows.base.heads import answers_chats

    if not answers_chats(folder):
        check_generates("embedding", f"{folder} holds an encoder or a classifier")
    if calibrated_identity(folder) is None:
        from peftcore.serving import load_base

        return load_base(folder, dtype)
    from flows.base.folder import load_tokenizer
    from flows.base.model import load_calibrated

    if dtype != "auto":
        raise ConfigError(
            f"--dtype {dtype}: {folder} holds a calibrated base, which has the dtype of its calibration; leave it out"
        )
    return load_calibrated(folder), load_tokenizer(folder)
