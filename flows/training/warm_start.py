"""Training that continues from a registered adapter. The optimiser and the schedule start anew."""

import json
import logging
from dataclasses import replace
from typing import Any

from flows.errors import StageError
from flows.params import Params
from flows.params.method_fields import FIELDS
from flows.paths import Paths
from peftcore import PeftConfig, PeftModel
from peftcore.injection import find_targets

log = logging.getLogger(__name__)
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "trainable_token_indices")
"""Options that must equal those of the registered adapter."""


def starts_warm(paths: Paths) -> bool:
    """Return True if the start stage wrote an adapter to continue from."""
    return paths.start_adapter.is_dir()


def continue_adapter(params: Params, paths: Paths, model: Any, config: PeftConfig) -> Any:
    """Return the model with the trainable adapter of `paths.start`, and with the dropout of `config`.

    Args:
        params: The parameters of the run.
        paths: The project's files.
        model: The base model.
        config: The configuration of a new adapter with these parameters.

    Raises:
        StageError: The configurations differ in method, shape or layers, or the method has a schedule over one whole
            run.
    """
    version = json.loads(paths.start_source.read_text(encoding="utf-8"))["version"]
    if config.has_schedule:
        raise StageError(
            f"train.start_from: {params.method.name} schedules its ranks over one run and cannot continue {version}; "
            "give null, or another method"
        )
    saved = PeftConfig.from_pretrained(paths.start_adapter)
    fields = FIELDS.get(params.method.name, {})
    shape = dict.fromkeys((*SHAPE, *(fields[option] for option in ("r", "lora_alpha") if option in fields)))
    names = ["method", "trainable_token_indices"] if params.method.r == "auto" else ["method", *shape]
    pairs = {name: (getattr(saved, name, None), getattr(config, name, None)) for name in names}
    if different := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        listed = ", ".join(f"{name} {there} there and {here} here" for name, (there, here) in different.items())
        raise StageError(
            f"train.start_from: {version} has {listed}; give method the values of {version} "
            f"(`peftcore registry show {version}`), or start anew with null"
        )
    _check_layers(model, saved, config, version)
    if dropout := fields.get("lora_dropout"):
        saved = replace(saved, **{dropout: getattr(config, dropout)})
    log.info("continuing from the adapter of %s", version)
    return PeftModel.from_pretrained(model, paths.start_adapter, is_trainable=True, config=saved)


def _check_layers(model: Any, saved: Any, config: Any, version: str) -> None:
    """Raise StageError if two configurations of one method adapt different layers."""
    if not hasattr(saved, "target_modules"):
        return
    there, here = (set(find_targets(model, one)) for one in (saved, config))
    if different := sorted(there ^ here):
        raise StageError(
            f"train.start_from: {version} adapts {len(there)} layers, and method.target_modules names {len(here)}; "
            f"{different[0]} is one of the {len(different)} in which they differ; give the target_modules of "
            f"{version} (`peftcore registry show {version}`), or start anew with null"
        )
