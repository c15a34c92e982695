"""The class of transformers that a base is loaded by, from its configuration."""

import inspect
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads all weights of a base that the pipeline can use.

    AutoModelForSequenceClassification for a classifier or reranker, AutoModel for another encoder, such as BERT, and
    AutoModelForCausalLM for everything else.
    """
    name = (config.architectures or [""])[0]
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return AutoModelForSequenceClassification
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not name or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not is_encoder:
        return AutoModelForCausalLM
    return AutoModel


def generates_text(folder: Path) -> bool:
    """Return True if a folder holds a causal language model; also if its config.json cannot be read."""
    if not (folder / "config.json").is_file():
        return True
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):  # not JSON, or of an unknown type
        return True
    return auto_class(config) is AutoModelForCausalLM


def ranks_passages(config: PreTrainedConfig) -> bool:
    """Return True if a base is a trained reranker: a sequence classifier with one output."""
    return auto_class(config) is AutoModelForSequenceClassification and config.num_labels == 1


def without_pooler(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the options by which AutoModel leaves out a pooling layer, which embeddings do not use."""
    model: Any = MODEL_MAPPING[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model).parameters else {}
