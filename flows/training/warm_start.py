"""Training that goes on from a registered adapter instead of a new one; the optimiser and the schedule begin anew."""

import json
import logging
from typing import Any

from flows.errors import StageError
from flows.params.model import Params
from flows.paths import Paths
from peftcore import PeftConfig, PeftModel

log = logging.getLogger(__name__)
SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora")
"""Options that an adapter is made by; a run that gives others asks for another adapter."""


def starts_warm(paths: Paths) -> bool:
    """Whether the start stage left an adapter to go on from."""
    return paths.start_adapter.is_dir()


def continue_adapter(params: Params, paths: Paths, model: Any, config: PeftConfig) -> Any:
    """The model with the adapter of `paths.start`, trainable; config: what a new one would have been made by.

    Raises StageError where the two differ in method or shape.
    """
    version = json.loads(paths.start_source.read_text())["version"]
    saved = PeftConfig.from_pretrained(paths.start_adapter)
    names = ["peft_type"] if params.method.r == "auto" else ["peft_type", *SHAPE]
    pairs = {name: (getattr(saved, name, None), getattr(config, name, None)) for name in names}
    if other := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        told = ", ".join(f"{name} {there} there and {here} here" for name, (there, here) in other.items())
        raise StageError(
            f"train.start_from: {version} has {told}; give method the values of {version} "
            f"(`peftcore registry show {version}`), or start anew with null"
        )
    log.info("going on from the adapter of %s", version)
    return PeftModel.from_pretrained(model, paths.start_adapter, is_trainable=True)
