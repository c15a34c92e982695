"""`peft.peft_model`: the class of models with adapters, its task classes, and their status."""

from typing import Any

from peftcore.hf_peft.classes import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peftcore.model import PeftModel

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
]


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
