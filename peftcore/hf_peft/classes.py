"""HF PEFT's classes of models and layers, for `isinstance` checks.

peftcore has one class for all tasks and one wrapper for all methods. The classes here are not their bases. They answer
`isinstance` by what a model or a layer holds.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from peftcore.bases.base import BaseWeight
from peftcore.config import PeftConfig, TaskType
from peftcore.errors import ConfigError, PeftError
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.adapter_parameters import AdapterParameters
from peftcore.layers.saved_module import SavedModule
from peftcore.model import PeftModel, get_peft_model
from peftcore.model.peft_model import IS_MIXED
from peftcore.registry import methods


class _TaskClass(type):
    """Metaclass of the task classes: an instance is a PeftModel whose first adapter has the class's task."""

    task_type: TaskType

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, PeftModel) or not instance.peft_config:
            return False
        return next(iter(instance.peft_config.values())).task_type == cls.task_type

    def __call__(cls, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> Any:
        cls._refuse_subclass()
        if peft_config.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{cls.__name__}: task_type must be {cls.task_type.value!r} or None; got {peft_config.task_type!r}"
            )
        peft_config.task_type = cls.task_type
        return get_peft_model(model, peft_config, adapter_name, **kwargs)

    def from_pretrained(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter; see `PeftModel.from_pretrained`."""
        cls._refuse_subclass()
        return PeftModel.from_pretrained(model, *args, **kwargs)

    def _refuse_subclass(cls) -> None:
        """Raise PeftError for a subclass, whose methods the model would not have."""
        if cls.__base__ is not object:
            raise PeftError(
                f"{cls.__name__} cannot be made: {cls.__base__.__name__} is no base class, because a model with "  # type: ignore[union-attr]
                "adapters keeps its own class; override methods in a subclass of the base model's class"
            )


class PeftModelForCausalLM(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="CAUSAL_LM"."""

    task_type = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="SEQ_2_SEQ_LM"."""

    task_type = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="SEQ_CLS"."""

    task_type = TaskType.SEQ_CLS


class PeftModelForTokenClassification(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="TOKEN_CLS"."""

    task_type = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="QUESTION_ANS"."""

    task_type = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(metaclass=_TaskClass):
    """A PeftModel whose first adapter has task_type="FEATURE_EXTRACTION"."""

    task_type = TaskType.FEATURE_EXTRACTION


class _Mixed(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, PeftModel):
            return False
        return IS_MIXED in vars(instance) or len({c.peft_type for c in instance.peft_config.values()}) > 1

    def __call__(cls, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> Any:
        return get_peft_model(model, peft_config, adapter_name, mixed=True)

    def from_pretrained(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter; see `PeftModel.from_pretrained`."""
        loaded = PeftModel.from_pretrained(model, *args, **kwargs)
        vars(loaded)[IS_MIXED] = True
        return loaded


class PeftMixedModel(metaclass=_Mixed):
    """A PeftModel made with `mixed=True`, or with adapters of several methods; every PeftModel can mix methods."""


class _Wrapper(type):
    """Metaclass of the layer classes; such a class is never made."""

    wrappers: tuple[type, ...]

    def __setattr__(cls, name: str, value: Any) -> None:
        if callable(value):  # others may be notes of a program, such as "patched"
            raise PeftError(
                f"{cls.__name__}.{name} cannot be set, because peftcore never calls it: the layers and prompts of a "
                "model are of classes of its own; set it on those objects"
            )
        super().__setattr__(name, value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.wrappers)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.wrappers)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise PeftError(
            f"{cls.__name__} cannot be made by itself; peftcore's layers are made by get_peft_model, or by "
            "inject_adapter_in_model on any module"
        )


class BaseTunerLayer(metaclass=_Wrapper):
    """A layer with adapters."""

    wrappers = (AdapterLayer, AdapterParameters)
    adapter_layer_names: tuple[str, ...] = ()


class AuxiliaryTrainingWrapper(metaclass=_Wrapper):
    """A module with one trainable copy per adapter (`modules_to_save`)."""

    wrappers = (SavedModule,)
    adapter_layer_names: tuple[str, ...] = ()


class ModulesToSaveWrapper(metaclass=_Wrapper):
    """A module with one trainable copy per adapter (`modules_to_save`)."""

    wrappers = (SavedModule,)
    adapter_layer_names = SavedModule.adapter_layer_names


class _OfMethod(_Wrapper):
    """Metaclass of the layer classes of one method, and of the methods whose layers are subclasses in HF PEFT."""

    peft_types: ClassVar[tuple[str, ...]]
    fits: Any  # Callable[[BaseWeight], bool]; a class variable of this type would be bound as a method
    """Whether a base layer is one of these."""

    def __instancecheck__(cls, instance: Any) -> bool:
        adapter_classes = tuple(methods()[peft_type].adapter for peft_type in cls.peft_types)
        if isinstance(instance, AdapterParameters):
            slots = [instance.sites[name] for name in instance.sites]
        elif isinstance(instance, AdapterLayer):
            slots = [instance]
        else:
            return False
        if not any(cls.fits(slot.base) for slot in slots):
            return False
        return any(isinstance(slot.adapters[name], adapter_classes) for slot in slots for name in slot.adapters)


_PARAMETERS: dict[str, tuple[str, ...]] = {
    "ADALORA": ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"),
    "ADAMSS": ("adamss_A", "adamss_B"),
    "BEFT": ("beft_bias",),
    "BOFT": ("boft_R", "boft_s"),
    "C3A": ("c3a_kernel",),
    "DEFT": ("deft_P", "deft_R"),
    "DELORA": ("delora_A", "delora_B", "delora_lambda"),
    "FOURIERFT": ("fourierft_spectrum",),
    "FROD": ("frod_lambda_l", "frod_lambda_s_values"),
    "GLORA": ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
    "GRALORA": ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
    "HIRA": ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "HRA": ("hra_u",),
    "IA3": ("ia3_l",),
    "LILY": ("lily_A", "lily_B", "lily_router"),
    "LN_TUNING": ("ln_tuning_layers",),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "MISS": ("miss_block",),
    "OFT": ("oft_R", "oft_embedding_R"),
    "OSF": ("osf_svd_params",),
    "PEANUT": ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
    "POLY": ("poly_lora_A", "poly_lora_B", "poly_router"),
    "PSOFT": ("psoft_R",),
    "PVERA": ("pvera_lambda_b", "pvera_lambda_d"),
    "RANDLORA": ("randlora_lambda", "randlora_gamma"),
    "ROAD": ("road_theta", "road_alpha"),
    "SHIRA": ("shira_weight",),
    "SUPERTUNING": ("supertuning_values", "supertuning_lora_A", "supertuning_lora_B"),
    "TINYLORA": ("tinylora_v",),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    "UNILORA": ("unilora_theta_d",),
    "VBLORA": ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "WAVEFT": ("waveft_spectrum",),
}
"""{method: attributes of HF PEFT's layers that hold parameters}, which libraries read from the classes"""


def layer_class(
    name: str,
    peft_type: str,
    fits: Callable[[BaseWeight], bool] = lambda base: True,
    derived: tuple[str, ...] = (),
) -> Any:
    """Return a class for `isinstance` checks of layers with an adapter of one method.

    Args:
        name: the class's name.
        peft_type: the method.
        fits: whether a base layer is one of these; all are by default.
        derived: further methods whose layer classes are subclasses of this one in HF PEFT.
    """
    members = {
        "peft_types": (peft_type, *derived),
        "fits": staticmethod(fits),
        "wrappers": (AdapterLayer, AdapterParameters),
        "adapter_layer_names": _PARAMETERS.get(peft_type, ()),
    }
    return _OfMethod(name, (), {**members, "__doc__": f"A layer with an adapter of {peft_type}."})


_BITSANDBYTES = {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit"}
_OTHER_STORAGES = {
    "AwqLoraLinear": "awq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
}
_BY_STORAGE = {
    "LORA": {**_BITSANDBYTES, **_OTHER_STORAGES},
    "ADALORA": {"SVDLinear4bit": "bnb 4bit", "SVDLinear8bitLt": "bnb 8bit", "SVDQuantLinear": "gptq"},
    **dict.fromkeys(("HIRA", "IA3", "PVERA", "RANDLORA", "ROAD"), _BITSANDBYTES),
}
"""{method: {class of HF PEFT for linear layers of one storage: `BaseWeight.backend`}}"""
_LINEAR = {
    "ADALORA": "SVDLinear",
    "C3A": "C3ALinear",
    "DEFT": "DeftLinear",
    "DELORA": "DeloraLinear",
    "FOURIERFT": "FourierFTLinear",
    "GLORA": "GloraLinear",
    "HRA": "HRALinear",
    "MISS": "MissLinear",
    "WAVEFT": "WaveFTLinear",
}
"""{method: HF PEFT's name of its class for linear layers, where it is not "Linear"}"""
_CONVOLUTIONS = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
_OTHER_LAYERS: dict[str, tuple[str, ...]] = {
    "ADALORA": ("SVDConv2d",),
    "BOFT": ("Conv2d",),
    "HIRA": ("Conv1d", "Conv2d", "Conv3d", "Embedding"),
    "HRA": ("HRAConv2d",),
    "IA3": ("Conv2d", "Conv3d"),
    "LOHA": ("Conv1d", "Conv2d"),
    "LOKR": ("Conv1d", "Conv2d"),
    "LORA": ("Conv1d", "Conv2d", "Conv3d", "Embedding", "ParamWrapper"),
    "OFT": ("Conv2d", "Embedding"),
    "TINYLORA": ("Embedding",),
}
"""{method: HF PEFT's classes for layers that are not linear}"""


def layer_classes(peft_type: str) -> dict[str, Any]:
    """Return {name: class} of HF PEFT's classes for the layers of a method, besides its `...Layer`."""
    by_storage = _BY_STORAGE.get(peft_type, {})

    def plain(base: BaseWeight) -> bool:
        return base.kind == "linear" and base.backend not in by_storage.values()

    def stored(backend: str) -> Callable[[BaseWeight], bool]:
        return lambda base: base.kind == "linear" and base.backend == backend

    def of_kind(name: str) -> Callable[[BaseWeight], bool]:
        for ending, convolution in _CONVOLUTIONS.items():
            if name.endswith(ending):
                return lambda base: base.kind == "conv" and isinstance(base.layer, convolution)
        kind = "embedding" if name == "Embedding" else "parameter"
        return lambda base: base.kind == kind

    fits = dict.fromkeys(("Linear", _LINEAR.get(peft_type, "Linear")), plain)
    fits |= {name: stored(backend) for name, backend in by_storage.items()}
    fits |= {name: of_kind(name) for name in _OTHER_LAYERS.get(peft_type, ())}
    return {name: layer_class(name, peft_type, check) for name, check in fits.items()}


class _TokensWrapper(_Wrapper):
    """Metaclass of the class of layers whose rows train beside an adapter of another method."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdapterLayer) and instance.has_token_adapter


class TrainableTokensWrapper(metaclass=_TokensWrapper):
    """A layer of which rows train (`trainable_token_indices`); its attribute `token_adapter` holds these rows."""

    wrappers = (AdapterLayer,)
    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)


class _Prompt(_Wrapper):
    """Metaclass of the classes of prompt learners."""

    peft_type: ClassVar[str]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, methods()[cls.peft_type].adapter)


class PromptEmbedding(metaclass=_Prompt):
    """The prompt of prompt tuning, a submodule of its model."""

    peft_type = "PROMPT_TUNING"
    wrappers = ()


class MultitaskPromptEmbedding(metaclass=_Prompt):
    """The prompt of multitask prompt tuning, a submodule of its model."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    wrappers = ()


class PromptEncoder(metaclass=_Prompt):
    """The prompt of P-tuning, a submodule of its model."""

    peft_type = "P_TUNING"
    wrappers = ()


class PrefixEncoder(metaclass=_Prompt):
    """The prefix of prefix tuning, a submodule of its model."""

    peft_type = "PREFIX_TUNING"
    wrappers = ()


class CartridgeEncoder(metaclass=_Prompt):
    """The prefix of Cartridge, a submodule of its model."""

    peft_type = "CARTRIDGE"
    wrappers = ()


class CPTEmbedding(metaclass=_Prompt):
    """The prompt of context-aware prompt tuning, a submodule of its model."""

    peft_type = "CPT"
    wrappers = ()


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Return True if a directory or a hub repository holds an adapter.

    Args:
        model_name_or_path: a directory, or the id of a repository on the hub.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftError, OSError):
        return False
    return True


def has_adapters(model: nn.Module) -> bool:
    """Return True if a model has adapters."""
    return ATTRIBUTE in model.__dict__ and bool(adapter_set(model).configs)
