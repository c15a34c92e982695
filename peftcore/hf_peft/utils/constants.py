"""`peft.utils.constants`."""

from typing import Any

from peftcore.detection.model_kind import NO_MODEL_CONFIG as DUMMY_MODEL_CONFIG
from peftcore.hf_peft.default_targets import is_table, table
from peftcore.hf_peft.reexports import reexported
from peftcore.hf_peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)
from peftcore.injection.targets import MANY_TARGETS as MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peftcore.injection.targets import NO_TARGETS as DUMMY_TARGET_MODULES

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
"""Names of input and output embeddings, whose weights `save_embedding_layers="auto"` saves with an adapter."""
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
"""Names of heads that train with the adapter of a classifier."""
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
"""Name of a tokenizer's file."""

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
]


def __getattr__(name: str) -> Any:
    return table(name, __name__) if is_table(name) else reexported(__name__, name)
