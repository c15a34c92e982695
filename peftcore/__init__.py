"""Parameter-efficient fine-tuning under the names that HF PEFT's users know."""

from peftcore.config import PeftConfig, TaskType
from peftcore.detect import Architecture, detect
from peftcore.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    MergeError,
    PeftError,
    TargetError,
    TrainingError,
)
from peftcore.inject import inject_adapter_in_model
from peftcore.methods.adalora import AdaLoraConfig
from peftcore.methods.lora import LoraConfig
from peftcore.model import PeftModel, get_peft_model, prepare_model_for_kbit_training

__all__ = [
    "AdaLoraConfig",
    "AdapterNameError",
    "Architecture",
    "CheckpointError",
    "ConfigError",
    "LoraConfig",
    "MergeError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "TargetError",
    "TaskType",
    "TrainingError",
    "detect",
    "get_peft_model",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
]
