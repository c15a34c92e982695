"""`peft.utils.constants`."""

from typing import Any

from peftcore.detection.model_kind import NO_MODEL_CONFIG as DUMMY_MODEL_CONFIG
from peftcore.hf_peft.default_targets import table
from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)
from peftcore.injection.targets import MANY_TARGETS as MIN_TARGET_MODULES_FOR_OPTIMIZATION

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
]


def __getattr__(name: str) -> Any:
    return table(name, __name__)
