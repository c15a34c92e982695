"""Adding, loading, exchanging and deleting of adapters."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftcore._util.both_libraries import refuse_hf_peft
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError, suggestion
from peftcore.files import hub
from peftcore.injection import activation, inject
from peftcore.injection.adapter_set import adapter_set
from peftcore.injection.preparation import Creation
from peftcore.model.adapted_module import AdaptedModule
from peftcore.storage import checkpoint
from peftcore.storage.hotswap import hotswap_adapter, hotswaps, prepare_model_for_compiled_hotswap
from peftcore.storage.reading import IncompatibleKeys, Reading, check_offload


class LoadingMethods(AdaptedModule):
    """Methods of `PeftModel` that add, load, exchange and delete adapters."""

    def add_adapter(
        self,
        adapter_name: str | PeftConfig,
        peft_config: PeftConfig | str | None = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter, without making it active. As in PEFT, it trains from `set_adapter` on.

        Routes can train adapters that are not active: call `set_requires_grad` for those. In transformers' order,
        `add_adapter(config, name="default")`, the adapter becomes the active one, as in transformers. On an error the
        model stays as it was.

        Args:
            adapter_name: the adapter's name.
            peft_config: the configuration.
            low_cpu_mem_usage: True leaves the parameters on the meta device, until a saved adapter is read into them.
            autocast_adapter_dtype: True: float32 parameters on 16-bit layers; False: the dtype of the layers.

        Raises:
            ConfigError: an option does not fit the model, or the arguments are not a name and a configuration.
            TargetError: no layer matches, or a matching layer cannot be adapted.
            AdapterNameError: the name is not valid, or taken.
        """
        in_transformers_order = isinstance(adapter_name, PeftConfig)
        name: Any
        if in_transformers_order:
            name, config = peft_config or "default", adapter_name
        else:
            name, config = adapter_name, peft_config
        refuse_hf_peft(adapter_name)
        refuse_hf_peft(config)
        if not isinstance(config, PeftConfig):
            raise ConfigError(
                f"add_adapter takes a name and a configuration, such as LoraConfig(); got {adapter_name!r:.200} and "
                f"{peft_config!r:.200}"
            )
        creation = Creation(autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        inject.add_adapter(self._module, config, name, creation)
        if in_transformers_order:
            activation.set_adapter(self._module, name)
        else:
            activation.set_requires_grad(self._module, name, False)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | int | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> IncompatibleKeys:
        """Load a further adapter, without making it active, or new weights into an adapter that is loaded.

        As in PEFT: if the model has an adapter of this name, it keeps its configuration and gets the saved tensors. The
        whole model is then in evaluation mode, and a further adapter trains from `set_adapter` on. With `is_trainable`
        modes stay as they are, and a further adapter is in training mode and trains at once. On an error the model
        stays as it was.

        Args:
            model_id: a directory, or a hub id such as "owner/name"; an existing directory has precedence.
            adapter_name: the adapter's name in this model.
            is_trainable: True to train the adapter further.
            torch_device: the device to which the tensors are read, before each moves to its layer's device.
            autocast_adapter_dtype: see `from_pretrained`.
            ephemeral_gpu_offload: see `from_pretrained`.
            low_cpu_mem_usage: see `from_pretrained`.
            key_mapping: see `from_pretrained`.
            kwargs: options of the download, `strict`, `ignore_mismatched_sizes` and `adapters`, see `from_pretrained`;
                `config`: a configuration in place of the saved one; and `hotswap`: True exchanges the loaded LoRA
                `adapter_name` for the saved one, in the same memory, as `hotswap_adapter` does. "auto", the default,
                does so after `enable_peft_hotswap`.

        Returns:
            The missing and the unexpected keys, as in PEFT; both empty, unless `strict=False` or
            `ignore_mismatched_sizes=True` accepts some.

        Raises:
            CheckpointError: the adapter is not found, is damaged, or does not fit the base model or the loaded adapter.
            AdapterNameError: the name is not valid.
            ConfigError: an option has a value that does not fit.
            TypeError: an option is unknown.
        """
        hotswap, is_enabled = kwargs.pop("hotswap", "auto"), bool(vars(self).get("_hotswap_enabled"))
        if hotswaps(hotswap, is_enabled=is_enabled, is_loaded=adapter_name in self.peft_config):
            others = {"is_trainable": is_trainable, "ephemeral_gpu_offload": ephemeral_gpu_offload}
            others |= {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": not autocast_adapter_dtype}
            if unused := [name for name, is_set in others.items() if is_set]:
                raise ConfigError(
                    f"load_adapter: {unused[0]} has no effect on an exchange, which keeps the parameters of the loaded "
                    "adapter; leave it out, or give hotswap=False"
                )
            hotswap_adapter(self._module, model_id, adapter_name, torch_device, key_mapping=key_mapping, **kwargs)
            return IncompatibleKeys([], [])
        config, experts = kwargs.pop("config", None), kwargs.pop("adapters", None)
        options, further = split_reading("load_adapter", {**kwargs, "torch_device": torch_device})
        config = with_experts("load_adapter", config, model_id, experts, options)
        check_offload(ephemeral_gpu_offload)
        reading = Reading(autocast_adapter_dtype, low_cpu_mem_usage, key_mapping=key_mapping, **further)
        directory = hub.adapter_directory(model_id, needs_config=config is None, **options)
        with hub.naming_download(model_id):
            if adapter_name in self.peft_config:
                if config is not None:
                    raise ConfigError(
                        f"load_adapter: config has no effect on {adapter_name!r}, which is loaded and keeps its own; "
                        "leave it out, or delete the adapter first"
                    )
                result = checkpoint.load_adapter_weights(self._module, directory, adapter_name, reading=reading)
            else:
                result = checkpoint.load_adapter(
                    self._module, directory, adapter_name, is_trainable, config, reading=reading
                ).result
        wrappers = adapter_set(self._module).layers.values()
        if not is_trainable and (self._module.training or any(wrapper.training for wrapper in wrappers)):
            self._module.eval()  # slow: visits every adapter that is loaded
        return result

    def load_adapter_weights(self, directory: str | Path, adapter_name: str = "default") -> None:
        """Read the tensors of a saved adapter into a loaded adapter with the same configuration.

        Args:
            directory: the saved adapter.
            adapter_name: the loaded adapter, whose weights are overwritten.

        Raises:
            CheckpointError: the directory is damaged, or its tensors do not fit.
            AdapterNameError: the adapter is not loaded.
        """
        checkpoint.load_adapter_weights(self._module, Path(directory), adapter_name)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete adapters; layers without an adapter become plain layers again.

        If all active adapters are deleted, the first remaining one by name becomes active, with a warning; after a
        prompt, the oldest one. An error leaves all adapters in place.

        Args:
            adapter_name: one name or several.

        Raises:
            AdapterNameError: an adapter is not loaded, or in use by an open route.
            MergeError: an adapter of this name is merged; other merged adapters may stay merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activation.delete_adapter(self._module, *names)

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Let `load_adapter` exchange a loaded LoRA for one of another rank, without a new compilation.

        As `prepare_model_for_compiled_hotswap` does, this gives each LoRA of the model rank `target_rank`. From then
        on `load_adapter` with the name of a loaded LoRA exchanges it, unless `hotswap=False`.

        Args:
            target_rank: largest rank of all adapters that will be loaded.
            check_compiled: "error", "warn" or "ignore" a model that is compiled already.

        Raises:
            HotswapError: the model has no LoRA, is compiled already, or a layer cannot have this rank.
        """
        prepare_model_for_compiled_hotswap(self._module, target_rank=target_rank, check_compiled=check_compiled)
        vars(self)["_hotswap_enabled"] = True


def make_room(model: nn.Module, name: str, directory: Path, config: PeftConfig | None, reading: Reading) -> None:
    """Delete the adapter of this name, if a saved adapter can take its place, with a warning, as in PEFT."""
    if name not in adapter_set(model).configs:
        return
    checkpoint.load_adapter(model, directory, f"another {name}", False, config, reading=reading)  # errors come here
    for one in (f"another {name}", name):
        inject.delete_adapter(model, one)
    warnings.warn(
        f"adapter {name!r} was loaded already and is replaced by the one of {directory}; to keep both, give the new "
        "one another adapter_name",
        stacklevel=4,
    )


_UNUSED = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "torch_dtype", "dtype")
"""Options that scripts give to PEFT's `from_pretrained`, and that concern the base model."""
_PARAMETERS = ("adapter_name", "is_trainable", "config", "autocast_adapter_dtype", "low_cpu_mem_usage", "key_mapping")
"""Parameters of the functions that load adapters, which a misspelt option may mean."""
_READING_OPTIONS = ("torch_device", "strict", "ignore_mismatched_sizes")


def split_reading(function: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (options of the download, further options of `Reading`) among a function's keyword arguments."""
    options, others = hub.split_options(kwargs)
    further = {name: others.pop(name) for name in _READING_OPTIONS if name in others}
    if others.pop("use_safetensors", True) is not True:
        raise ConfigError(f"{function}: use_safetensors must be True, because pickles are never read")
    if unused := [name for name in _UNUSED if others.pop(name, None) is not None]:
        warnings.warn(
            f"{function}: {', '.join(unused)} has no effect: the adapter is on the devices of its layers; give it to "
            "the base model's from_pretrained",
            stacklevel=3,
        )
    if others:
        name, known = next(iter(others)), [*hub.OPTIONS, *_READING_OPTIONS, *_PARAMETERS]
        raise TypeError(f"{function}() has no option {name!r}{suggestion(name, known)}")
    return options, further


def with_experts(
    function: str,
    config: PeftConfig | None,
    model_id: str | os.PathLike[str],
    experts: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> PeftConfig | None:
    """Return X-LoRA's configuration with other locations of its LoRAs; unchanged if `experts` is None."""
    if experts is None:
        return config
    saved = PeftConfig.from_pretrained(model_id, **options) if config is None else config
    if not hasattr(saved, "adapters"):
        raise ConfigError(f"{function}: adapters is an option of X-LoRA; the adapter is {saved.method}, leave it out")
    return dataclasses.replace(saved, adapters=dict(experts))  # type: ignore[call-arg]
