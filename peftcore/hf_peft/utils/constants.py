"""`peft.utils.constants`."""

from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from peftcore.injection.targets import MANY_TARGETS as MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peftcore.injection.tuner_model import NO_MODEL_CONFIG as DUMMY_MODEL_CONFIG

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
]
