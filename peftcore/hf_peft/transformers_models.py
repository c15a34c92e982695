"""`load_adapter` of a plain transformers model, and `from_pretrained` of an adapter's directory, by `peftcore.as_peft`.

The other methods of transformers' `PeftAdapterMixin` (`add_adapter`, `set_adapter`, `disable_adapters`, ...) call HF
PEFT's functions and methods of layers, which peftcore has. `load_adapter` writes tensors into parameters by HF PEFT's
names, so it is replaced by the function here, which reads a directory by the rules of `PeftModel.load_adapter`.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError, ConfigError
from peftcore.files import hub
from peftcore.files.tensors import refuse_pickles
from peftcore.injection import activation
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.inject import forget_removed_adapters, inject_adapter_in_model, show_configs
from peftcore.methods.lora import Lora
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of
from peftcore.storage import checkpoint
from peftcore.storage.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    hotswaps,
    prepare_model_for_compiled_hotswap,
)
from peftcore.storage.reading import IncompatibleKeys, Reading, renamed
from peftcore.storage.state_dict import set_peft_model_state_dict
from peftcore.storage.trainer_checkpoints import teach_trainer

_NO_SOURCE = "load_adapter needs a directory or a hub id, or peft_config with adapter_state_dict"
_FOR_PROMPTS = {
    "add_adapter": "call get_peft_model(model, config)",
    "load_adapter": "load the adapter with PeftModel.from_pretrained(model, directory)",
}
"""{method of a plain model: what gives the model a prompt}"""
_ACCESS = ("cache_dir", "force_download", "local_files_only", "token")
"""Options of the base model's download that the adapter's download gets, too."""
_FIELDS = frozenset(
    {"pretrained_model_name_or_path", "download_kwargs", "use_safetensors", "ignore_mismatched_sizes"}
    | {"weight_mapping", "hf_quantizer"}
)
"""Fields of transformers' `LoadStateDictConfig` that are used here."""
_WITHOUT_EFFECT = frozenset(
    {"device_map", "device_mesh", "disable_mmap", "disk_offload_folder", "dtype", "dtype_plan", "offload_buffers"}
    | {"sharded_metadata", "weights_only"}
)
"""Its other fields: an adapter has the devices and the dtypes of its layers, and one file of safetensors."""


def load_adapter(
    self: Any,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    peft_config: PeftConfig | None = None,
    adapter_state_dict: Mapping[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Load an adapter into a plain transformers model, and make it the active one. The model's class stays the same.

    An exchange by `hotswap` leaves the active adapters as they are.
    As in transformers, the model is in evaluation mode then, unless `is_trainable`, and a warning is logged of keys
    that `adapter_state_dict` lacks, or that the adapter does not have. A directory's adapter may be of the model with
    another head, or without one: `AutoModel` loads a causal LM's. On an error the model stays as it was.

    Args:
        self: the model.
        peft_model_id: a directory, or a hub id such as "owner/name".
        adapter_name: the adapter's name in the model; None for "default".
        peft_config: a configuration in place of the saved one.
        adapter_state_dict: {HF PEFT's key: tensor}, in place of a directory; needs `peft_config`.
        low_cpu_mem_usage: True: parameters get no memory before the saved tensors are there.
        is_trainable: whether its parameters get gradients.
        hotswap: True: exchange the loaded LoRA `adapter_name` for this one, in the same memory. "auto": do so after
            `enable_peft_hotswap`, if the adapter is loaded.
        local_files_only: True: nothing is downloaded.
        adapter_kwargs: options of the adapter's download, such as `revision`.
        load_config: transformers' options of `from_pretrained`, of which `download_kwargs`, `ignore_mismatched_sizes`
            and `weight_mapping` (with the `key_mapping` of `from_pretrained`) have a meaning for an adapter.
        kwargs: fields of `load_config`, one by one. As in transformers, `device_map` and `dtype` have no effect; here,
            they warn.

    Returns:
        transformers' `LoadStateDictInfo`.

    Raises:
        CheckpointError: the adapter is not found, is damaged, or was made for another base model.
        AdapterNameError: the name is not valid, or taken, or with `hotswap` not loaded.
        HotswapError: the new LoRA cannot take the place of the loaded one, or exceeds the rank of
            `enable_peft_hotswap`.
        ConfigError: an option has a value that does not fit, or the adapter is a prompt.
        TypeError: an option is unknown.
    """
    name = "default" if adapter_name is None else adapter_name
    forget_removed_adapters(self)
    loaded = adapter_set(self).configs if ATTRIBUTE in self.__dict__ else {}
    swaps = hotswaps(hotswap, is_enabled=bool(vars(self).get("_hotswap_enabled")), is_loaded=name in loaded)
    if name in loaded and not swaps:
        raise AdapterNameError(
            f"load_adapter: {name!r} is loaded already; give another adapter_name, or hotswap=True to exchange it"
        )
    values, options = _options(load_config, kwargs, adapter_kwargs or {}, local_files_only)
    ignore_mismatched_sizes, rename = bool(values["ignore_mismatched_sizes"]), _renaming(self, values)
    peft_model_id = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    if adapter_state_dict is not None and rename is not None:
        adapter_state_dict = renamed(adapter_state_dict, rename)
    if swaps:
        if low_cpu_mem_usage or ignore_mismatched_sizes:
            raise ConfigError("load_adapter: low_cpu_mem_usage and ignore_mismatched_sizes must be False with hotswap")
        keys = _exchange(self, peft_model_id, name, peft_config, adapter_state_dict, options)
    elif adapter_state_dict is not None:
        keys = _load_tensors(self, peft_config, adapter_state_dict, name, is_trainable, ignore_mismatched_sizes)
    elif peft_model_id is None:
        raise ConfigError(_NO_SOURCE)
    else:
        reading = Reading(
            False, low_cpu_mem_usage, ignore_mismatched_sizes=ignore_mismatched_sizes, any_head=True, rename=rename
        )
        directory = hub.adapter_directory(peft_model_id, needs_config=peft_config is None, **options)
        with hub.naming_download(peft_model_id):
            if peft_config is None:
                refuse_pickles(directory)
                peft_config = PeftConfig.from_pretrained(directory)
            refuse_prompts("load_adapter", peft_config)
            keys = checkpoint.load_adapter(self, directory, name, is_trainable, peft_config, reading=reading).result
    if not swaps and vars(self).get("_hotswap_enabled"):
        _prepare_for_hotswap(self, name)
    self._hf_peft_config_loaded = True
    show_configs(self)
    if swaps:
        activation.set_requires_grad(self, name, is_trainable)
    else:
        activation.set_adapter(self, name, inference_mode=not is_trainable)
    if not is_trainable:
        self.eval()
    teach_trainer()
    return _reported(self, keys, peft_model_id)


def _exchange(
    model: Any,
    peft_model_id: str | os.PathLike[str] | None,
    name: str,
    config: PeftConfig | None,
    tensors: Mapping[str, Tensor] | None,
    options: dict[str, Any],
) -> IncompatibleKeys:
    """Exchange a loaded LoRA for a saved one, or for the one of a state dict."""
    if tensors is not None:
        hotswap_adapter_from_state_dict(model, tensors, name, _checked_config(config))
    elif config is not None:
        raise ConfigError("load_adapter: peft_config must be None with hotswap; the saved configuration is read")
    elif peft_model_id is None:
        raise ConfigError(_NO_SOURCE)
    else:
        hotswap_adapter(model, peft_model_id, name, **options)
    return IncompatibleKeys([], [])


def _prepare_for_hotswap(model: Any, name: str) -> None:
    """Give a LoRA just loaded the rank of `enable_peft_hotswap`; on an error the adapter is removed again."""
    if adapter_set(model).kinds[name] is not Lora:
        return
    try:
        prepare_model_for_compiled_hotswap(model, **(model._prepare_peft_hotswap_kwargs or {}))
    except Exception:
        activation.delete_adapter(model, name)
        raise


def _options(
    load_config: Any, fields: Mapping[str, Any], adapter_kwargs: Mapping[str, Any], local_files_only: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (fields of `load_config`, options of the adapter's download)."""
    if unused := sorted(fields.keys() & _WITHOUT_EFFECT):
        warnings.warn(
            f"load_adapter: {', '.join(unused)} has no effect on an adapter, because its layers decide; leave it out",
            stacklevel=3,
        )
    if unknown := sorted(fields.keys() - _FIELDS - _WITHOUT_EFFECT):
        raise TypeError(
            f"load_adapter() has no option {unknown[0]!r}; "
            "give those of the download, such as revision, in adapter_kwargs"
        )
    values = {name: getattr(load_config, name, None) for name in _FIELDS} | dict(fields)
    if values["use_safetensors"] is False:
        raise ConfigError("load_adapter: use_safetensors must not be False, because pickles are never read")
    download = values["download_kwargs"] or {}
    options = {name: download[name] for name in _ACCESS if download.get(name) is not None}
    if fields.get("download_kwargs"):
        options |= fields["download_kwargs"]
    options |= {name: value for name, value in adapter_kwargs.items() if name != "_adapter_model_path"}
    if local_files_only:
        options["local_files_only"] = True
    return values, hub.checked_options("load_adapter", options)


def _renaming(model: Any, values: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return a function that renames a saved key by the caller's entries of `weight_mapping`; None if there are none.

    The model's own entries, which follow there, are left out: reading an adapter applies them where they are needed.
    """
    if not values["weight_mapping"]:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    own = {str(step) for step in get_model_conversion_mapping(model, hf_quantizer=values["hf_quantizer"])}
    steps = [step for step in values["weight_mapping"] if isinstance(step, WeightRenaming) and str(step) not in own]
    return (lambda key: rename_source_key(key, steps, [])[0]) if steps else None


def _load_tensors(
    model: nn.Module,
    config: PeftConfig | None,
    tensors: Mapping[str, Tensor],
    name: str,
    is_trainable: bool,
    ignore_mismatched_sizes: bool,
) -> IncompatibleKeys:
    own = dataclasses.replace(_checked_config(config), inference_mode=not is_trainable)
    refuse_prompts("load_adapter", own)
    inject_adapter_in_model(own, model, name)
    try:
        return set_peft_model_state_dict(model, tensors, name, ignore_mismatched_sizes)
    except Exception:
        model.peft_config.pop(name)  # type: ignore[union-attr]
        raise


def _checked_config(config: PeftConfig | None) -> Any:
    """Return the configuration that comes with a state dict; raise ConfigError if there is none."""
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"load_adapter: adapter_state_dict needs peft_config, a configuration; got {config!r:.200}")
    return config


def refuse_prompts(method: str, config: Any) -> None:
    """Raise ConfigError for a prompt, as HF PEFT does.

    A prompt works by hooks on the whole model, so a direct call of a plain model's `forward` would leave it out.

    Args:
        method: the model's method that was called, "add_adapter" or "load_adapter".
        config: what the caller gave as the configuration.
    """
    if isinstance(config, PeftConfig) and issubclass(method_of(config).adapter, PromptLearner):
        raise ConfigError(
            f"{method}: a plain model cannot have a prompt, got {config.method}; {_FOR_PROMPTS[method]} in place"
        )


def _reported(model: nn.Module, keys: IncompatibleKeys, source: Any) -> Any:
    """Return transformers' `LoadStateDictInfo`, after missing and unexpected keys were logged as transformers does."""
    from transformers.integrations import peft
    from transformers.utils.loading_report import LoadStateDictInfo, log_state_dict_report

    result = LoadStateDictInfo(set(keys.missing_keys), set(keys.unexpected_keys), set(), [], {}, set())
    logger: Any = peft.logger  # transformers annotates its own loggers as another class than the function takes
    log_state_dict_report(model, source, ignore_mismatched_sizes=True, loading_info=result, logger=logger)
    return result
