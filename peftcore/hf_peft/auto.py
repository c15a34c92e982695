"""`peft.auto`: classes that load the base model which an adapter's configuration names, and the adapter onto it."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

from peftcore.config import PeftConfig, TaskType
from peftcore.errors import ConfigError
from peftcore.files import hub
from peftcore.hf_peft.reexports import reexported
from peftcore.model import PeftModel

_TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_THE_ADAPTER = frozenset(
    {"adapters", "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "strict", "torch_device"}
)
"""Options that only the adapter gets."""
_OF_BOTH = frozenset({"ignore_mismatched_sizes", "key_mapping"})
"""Options that the adapter and the base get, as with HF PEFT."""
_ACCESS = frozenset({"cache_dir", "force_download", "local_files_only", "token"})
"""Options of the adapter's download that the base and the tokenizer get, too."""


def get_default_import_allowlist() -> list[str]:
    """Return the packages from which `auto_mapping` of a configuration may name a class."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Return True if a module is in one of the packages, so that a configuration cannot import any other."""
    return any(parent_name == package or parent_name.startswith(f"{package}.") for package in allowlist)


class _BaseAutoPeftModel:
    """A class that is never instantiated: `from_pretrained` returns a `PeftModel`."""

    task_type: ClassVar[TaskType | None] = None
    """Task of the adapters that the class loads; None: adapters without a task."""
    model_class: ClassVar[str] = ""
    """Name of the class of transformers that loads the base."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is not instantiated; call {type(self).__name__}.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base model that an adapter's configuration names, and the adapter onto it.

        If the adapter's directory holds a tokenizer with more tokens than the base, the base's embeddings are resized
        first, as with PEFT.

        Args:
            pretrained_model_name_or_path: the adapter: a directory, or a hub id such as "owner/name".
            adapter_name: the adapter's name in the model.
            is_trainable: whether the adapter's parameters get gradients.
            config: a configuration in place of the saved one, for the adapter. The saved one still names the base.
            revision: revision of the adapter; that of the base is in the configuration.
            import_allowlist: packages from which `auto_mapping` may name the base's class; None for
                `get_default_import_allowlist()`.
            kwargs: options of the adapter's download, of `PeftModel.from_pretrained`, and of the base's
                `from_pretrained`, such as `dtype` and `device_map`. The base gets `token`, `cache_dir`,
                `force_download`, `local_files_only`, `key_mapping` and `ignore_mismatched_sizes`, too.

        Returns:
            The base model with the adapter, as a `PeftModel`.

        Raises:
            CheckpointError: the adapter is not found, is damaged, or does not fit the base.
            ConfigError: the configuration names no base, or a base of another task.
        """
        options, others = hub.split_options({**kwargs, "revision": revision})
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, **options)
        if not saved.base_model_name_or_path:
            raise ConfigError(
                f"{pretrained_model_name_or_path} names no base model; load the base yourself, then call "
                "PeftModel.from_pretrained(base, adapter)"
            )
        allowlist = get_default_import_allowlist() if import_allowlist is None else import_allowlist
        loader = cls._loader(saved, allowlist)
        access = {name: options[name] for name in _ACCESS if name in options}
        of_base = {name: value for name, value in others.items() if name not in _OF_THE_ADAPTER}
        base = loader.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **access, **of_base)
        _fit_embeddings(base, pretrained_model_name_or_path, options, bool(others.get("trust_remote_code", False)))
        of_adapter = {name: value for name, value in others.items() if name in _OF_THE_ADAPTER | _OF_BOTH}
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **options, **of_adapter
        )

    @classmethod
    def _loader(cls, config: PeftConfig, allowlist: Sequence[str]) -> Any:
        """Return the class that loads the base."""
        if config.task_type != cls.task_type and config.task_type is not None:
            fitting = next(kind.__name__ for kind in _CLASSES if kind.task_type == config.task_type)
            given = TaskType(config.task_type).value
            raise ConfigError(f"{cls.__name__} does not load adapters of task_type {given}; use {fitting}")
        if config.task_type is None and config.auto_mapping is not None:
            return _named_class(config.auto_mapping, allowlist)
        if not cls.model_class:
            raise ConfigError(
                "AutoPeftModel needs auto_mapping, with the base's class, in the configuration, and it has none; use "
                "the class for the task, such as AutoPeftModelForCausalLM"
            )
        return getattr(import_module("transformers"), cls.model_class)


def _named_class(auto_mapping: dict[str, Any], allowlist: Sequence[str]) -> Any:
    """Return the class that a configuration names; only packages in the list are imported."""
    library, name = auto_mapping.get("parent_library"), auto_mapping.get("base_model_class")
    if not isinstance(library, str) or not isinstance(name, str):
        raise ConfigError(f"auto_mapping must have parent_library and base_model_class; got {auto_mapping!r:.200}")
    if not check_import_allowlist(allowlist, library):
        raise ConfigError(
            f"the configuration asks to import {library!r}, which is none of {', '.join(allowlist)}; if you trust this "
            f"package, give import_allowlist=[{library!r}]"
        )
    found = getattr(import_module(library), name, None)
    if not hasattr(found, "from_pretrained"):
        raise ConfigError(f"{library} has no class {name!r} with from_pretrained; load the base yourself")
    return found


def _fit_embeddings(
    base: Any, adapter: str | os.PathLike[str], options: dict[str, Any], trust_remote_code: bool
) -> None:
    """Enlarge the embeddings of the base if the adapter's directory has a tokenizer with more tokens."""
    if not hasattr(base, "get_input_embeddings"):
        return
    file = hub.further_file(adapter, _TOKENIZER_CONFIG, **options)
    if file is None:
        return
    from transformers import AutoTokenizer

    place: Any = file.parent
    access: dict[str, Any] = {}
    # offline, transformers finds no tokenizer by a hub id whose cache does not record that there is no config.json
    if not hub.is_local(adapter) and not hub.is_offline(options):
        place = adapter
        access = {name: options[name] for name in (*_ACCESS, "revision", "subfolder") if options.get(name) is not None}
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **access)
    if len(tokenizer) > len(base.get_input_embeddings().weight):
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """Loader of adapters without a task; `auto_mapping` in their configuration names the base's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """Loader of adapters with task_type="CAUSAL_LM"."""

    task_type = TaskType.CAUSAL_LM
    model_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """Loader of adapters with task_type="SEQ_2_SEQ_LM"."""

    task_type = TaskType.SEQ_2_SEQ_LM
    model_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """Loader of adapters with task_type="SEQ_CLS"."""

    task_type = TaskType.SEQ_CLS
    model_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """Loader of adapters with task_type="TOKEN_CLS"."""

    task_type = TaskType.TOKEN_CLS
    model_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """Loader of adapters with task_type="QUESTION_ANS"."""

    task_type = TaskType.QUESTION_ANS
    model_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """Loader of adapters with task_type="FEATURE_EXTRACTION"."""

    task_type = TaskType.FEATURE_EXTRACTION
    model_class = "AutoModel"


_CLASSES = (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
