"""`peft.mapping`: tables from the name of a method to its classes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peftcore.config import PeftConfig
from peftcore.hf_peft import classes
from peftcore.hf_peft.reexports import reexported
from peftcore.injection import tuner_models
from peftcore.injection.inject import inject_adapter_in_model
from peftcore.injection.tuner_model import parameter_prefix
from peftcore.registry import Method, PeftType, methods

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]

_PROMPTS: dict[str, Any] = {
    kind.peft_type: kind
    for kind in (
        classes.PromptEmbedding,
        classes.MultitaskPromptEmbedding,
        classes.PromptEncoder,
        classes.PrefixEncoder,
        classes.CartridgeEncoder,
        classes.CPTEmbedding,
    )
}


class _ByMethod(Mapping[Any, Any]):
    """{method: class}, read from the registry at each access, so that third-party methods are included.

    Args:
        class_of: Function from a registered method to its class; None leaves the method out.
    """

    def __init__(self, class_of: Callable[[Method], Any]):
        self._class_of = class_of

    def _table(self) -> dict[str, Any]:
        classes_by_name = {name: self._class_of(method) for name, method in methods().items()}
        return {name: kind for name, kind in classes_by_name.items() if kind is not None}

    def __getitem__(self, name: str) -> Any:
        return self._table()[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(PeftType(name) if name in PeftType.__members__ else name for name in self._table())

    def __len__(self) -> int:
        return len(self._table())


_TUNERS = {kind.peft_type: kind for kind in vars(tuner_models).values() if getattr(kind, "peft_type", "")}

PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[Any, type[PeftConfig]] = _ByMethod(lambda method: method.config)
"""{method: configuration class}"""
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[Any, Any] = _ByMethod(
    lambda method: (_TUNERS | _PROMPTS).get(method.name, tuner_models.TunerModel)
)
"""{method: HF PEFT's model class or prompt class}"""
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[Any, Any] = _ByMethod(
    lambda method: None if method.name in _PROMPTS else tuner_models.TunerModel
)
"""{method that can be mixed with others: class of the view on a mixed model}"""
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[Any, str] = _ByMethod(lambda method: parameter_prefix(method.name))
"""{method: start of the names of its parameters, such as "lora_"}"""
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, Any] = {
    kind.task_type: kind
    for kind in (
        classes.PeftModelForSequenceClassification,
        classes.PeftModelForSeq2SeqLM,
        classes.PeftModelForCausalLM,
        classes.PeftModelForTokenClassification,
        classes.PeftModelForQuestionAnswering,
        classes.PeftModelForFeatureExtraction,
    )
}
"""{task: class of a PeftModel for the task}"""


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Return the configuration that a dictionary describes.

    Args:
        config_dict: the fields, with the method's name as `peft_type`.

    Raises:
        ConfigError: the method is unknown, a key is misspelt, or a value does not fit.
    """
    return PeftConfig.from_dict(config_dict)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
