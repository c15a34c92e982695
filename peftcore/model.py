"""`PeftModel`: a model with adapters. The model is not wrapped: only its class changes.

`get_peft_model` sets the class of the model object to a subclass `(PeftModel, its class)` of the same name. So its
signature, module paths, `generate`, `config` and `isinstance` checks work as before.
"""

import contextlib
import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from peftcore import merging
from peftcore._util.both_libraries import refuse_hf_peft
from peftcore._util.fingerprint import unchanging_weights
from peftcore.bases import GgufLinear, has_uncast_inputs
from peftcore.composition.algebra import Composition, Spec, weights_of
from peftcore.composition.route import Route
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError, suggestion
from peftcore.files import hub
from peftcore.injection import activation, forward_hooks, inject, merge
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set, untouched_names
from peftcore.injection.base_view import hide_model, show_model, view_of
from peftcore.injection.preparation import Creation
from peftcore.injection.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peftcore.injection.tuner_model import SHARED_TENSORS, SharedTensors, tuner_model
from peftcore.merging import LowRankReport, Recipe
from peftcore.merging.convertible import is_convertible
from peftcore.storage import checkpoint
from peftcore.storage.hotswap import hotswap_adapter, hotswaps, prepare_model_for_compiled_hotswap
from peftcore.storage.initial_adapter import start_subtracted
from peftcore.storage.reading import IncompatibleKeys, Reading, check_offload
from peftcore.storage.trainer_checkpoints import teach_trainer

__all__ = ["PeftModel", "get_peft_model", "prepare_model_for_kbit_training"]


_CALLERS_ROUTE = "_callers_route"
"""Attribute of a DataParallel replica that was made inside of a route: a function that opens the route."""
IS_MIXED = "_is_mixed"
"""Attribute of a model that was made with `mixed=True`."""
_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model in which DistributedDataParallel stores the names of tensors that it does not send."""


class _ActiveAdapters(list[str]):
    """A list, as in PEFT, that is also callable, because transformers has a method of this name."""

    def __call__(self) -> list[str]:
        return list(self)


class PeftModel:
    """The methods of a model with adapters.

    `get_peft_model` and `PeftModel.from_pretrained` make one. So does the call `PeftModel(model, config)`, which does
    what `get_peft_model(model, config)` does.

    Args:
        model: the base model; changed in place.
        peft_config: the configuration of the adapter.
        adapter_name: the adapter's name.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the model with an adapter; for the class of a model with adapters, a new plain model."""
        if cls is PeftModel:
            return get_peft_model(*args, **kwargs)
        return super().__new__(cls)

    # -- making ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter into a model, and make it the active one.

        As with PEFT, the model is then in evaluation mode. With `is_trainable` the adapter is in training mode, so its
        dropout is on, and the base keeps its mode. On an error the model stays as it was.

        On the class of a model with adapters, the class's own `from_pretrained` loads the base model if the first
        argument is not a model.

        Args:
            model: the base model; changed in place.
            model_id: a directory, or a hub id such as "owner/name"; an existing directory has precedence.
            adapter_name: the adapter's name in this model.
            is_trainable: whether its parameters get gradients.
            config: a configuration in place of the saved one. As in PEFT, the object becomes the adapter's own: options
                that the model decides are filled in, and `inference_mode` is set.
            autocast_adapter_dtype: True: float32 parameters on 16-bit layers; False: the dtype of the layers.
            ephemeral_gpu_offload: True is an error without CUDA, and a warning with it: loading computes nothing that
                could be offloaded.
            low_cpu_mem_usage: True: parameters get no memory before the saved tensors are there.
            key_mapping: {regular expression: replacement} for the saved keys without `base_model.model.`; None for
                the model's own mapping of modules that transformers has renamed.
            kwargs: options of the download (`revision`, `subfolder`, `token`, `cache_dir`, `force_download`,
                `local_files_only` and the others of `huggingface_hub.hf_hub_download`), and
                `torch_device`: the device to which the tensors are read, before each moves to its layer's device;
                `strict`: False accepts missing and unexpected keys, with a warning;
                `ignore_mismatched_sizes`: True treats tensors of another shape as missing;
                `adapters`: {name: directory or hub id} of the LoRAs that a saved X-LoRA mixes, if they are no longer
                where its configuration says.

        Returns:
            The model, as a `PeftModel`.

        Raises:
            CheckpointError: the adapter is not found, is damaged, or was made for another base model.
            AdapterNameError: the name is not valid, or that of an adapter of a PeftModel.
            ConfigError: an option has a value that does not fit.
            TypeError: an option is unknown.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"PeftModel.from_pretrained needs the base model first, then the adapter; got {model!r:.200}"
            )
        experts = kwargs.pop("adapters", None)
        options, further = _split_reading("from_pretrained", kwargs)
        config = _with_experts("from_pretrained", config, model_id, experts, options)
        check_offload(ephemeral_gpu_offload)
        reading = Reading(autocast_adapter_dtype, low_cpu_mem_usage, key_mapping=key_mapping, **further)
        directory = hub.adapter_directory(model_id, needs_config=config is None, **options)
        with hub.naming_download(model_id):
            if not isinstance(model, PeftModel) and ATTRIBUTE in model.__dict__:
                _make_room(model, adapter_name, directory, config, reading)
            adapters = checkpoint.load_adapter(
                model, directory, adapter_name, is_trainable, config, reading=reading
            ).adapters
        if config is not None:
            vars(config).update(vars(adapters.configs[adapter_name]))
            adapters.configs[adapter_name] = config
        adapters.selection.active = (adapter_name,)
        adapters.set_requires_grad(adapters.trainable - {adapter_name}, False)
        adapted = _as_peft_model(model)
        return adapted if is_trainable else adapted.eval()

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
            self.set_adapter(name)
        else:
            self.set_requires_grad(name, False)

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
        options, further = _split_reading("load_adapter", {**kwargs, "torch_device": torch_device})
        config = _with_experts("load_adapter", config, model_id, experts, options)
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

        If all active adapters are deleted, the first remaining one becomes active, with a warning. An error leaves all
        adapters in place.

        Args:
            adapter_name: one name or several.

        Raises:
            AdapterNameError: an adapter is not loaded, or in use by an open route.
            MergeError: an adapter of this name is merged; other merged adapters may stay merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activation.delete_adapter(self._module, *names)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors that `save_pretrained` writes for one adapter.

        Args:
            adapter_name: the adapter; None for the first active one.
            state_dict: a state dict of the model to take the values from; None for the model's own parameters.

        Returns:
            {PEFT's key without `base_model.model.`: tensor}, without embeddings of the base.

        Raises:
            AdapterNameError: the adapter is not loaded.
            CheckpointError: the state dict lacks parameters of the adapter.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        return checkpoint.adapter_state_dict(self._module, name, state_dict)

    # -- activation ------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """{adapter: configuration}."""
        return adapter_set(self._module).configs

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the first active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if adapters are in effect: at least one is active, and they are not disabled."""
        return bool(adapter_set(self._module).selection.in_effect)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full; None if there are none."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """Dtype of a transformers model; None for other models."""
        return getattr(self, "dtype", None)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of each layer with adapters; see `peftcore.get_layer_status`."""
        return get_layer_status(self._module)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of all layers with adapters together; see `peftcore.get_model_status`."""
        return get_model_status(self._module)

    @property
    def active_adapters(self) -> Any:
        """Names of the active adapters, in order: a list that is also callable, as in transformers."""
        return _ActiveAdapters(adapter_set(self._module).selection.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter; '' if none is active."""
        return next(iter(adapter_set(self._module).selection.active), "")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. As in PEFT, their parameters become trainable, and all other adapters are frozen.

        Merged adapters are unmerged first, with a warning.

        Args:
            adapter_name: one name or several, in order; [] for none.
            inference_mode: True freezes the active adapters, too.

        Raises:
            AdapterNameError: a name is not loaded, or given twice; several prompts are named; or several of the
                adapters train the same module in full (`modules_to_save`), or the same row of an embedding.
        """
        activation.set_adapter(self._module, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of all parameters of adapters.

        Args:
            adapter_names: one name or several.
            requires_grad: False freezes the adapters.

        Raises:
            AdapterNameError: a name is not loaded.
        """
        activation.set_requires_grad(self._module, adapter_names, requires_grad)

    def refresh_adapters(self) -> None:
        """Drop all values that were computed from weights; call this after edits in place through `.data`.

        Other changes are noticed without this call. See `peftcore.injection.activation.refresh_adapters`.
        """
        activation.refresh_adapters(self._module)

    def disable_adapters(self) -> None:
        """Disable the active adapters, in every thread, until `enable_adapters`; a method of transformers.

        `active_adapters` stays the same, and an open route has precedence.

        Raises:
            MergeError: adapters are merged; use the context `disable_adapter()`, or unmerge first.
        """
        activation.switch_adapters(self._module, on=False)

    def enable_adapters(self) -> None:
        """Enable the active adapters again after `disable_adapters`."""
        activation.switch_adapters(self._module, on=True)

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

    def disable_adapter_layers(self) -> None:
        """Do what `disable_adapters` does; PEFT's name."""
        self.disable_adapters()

    def enable_adapter_layers(self) -> None:
        """Do what `enable_adapters` does; PEFT's name."""
        self.enable_adapters()

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers with adapters, without raw parameters."""
        return tuner_model(self._module).targeted_module_names

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the raw parameters with adapters."""
        return tuner_model(self._module).targeted_parameter_names

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which this thread's calls compute the base model, even if adapters are merged.

        Raises:
            RoutingError: a route with adapters is opened inside; or adapters are merged, and another thread calls the
                model.
        """
        return activation.adapters_disabled(self._module)

    def route(self, adapters: Spec | Sequence[Spec]) -> contextlib.AbstractContextManager[Route]:
        """Return a context in which this thread's calls use a composition of adapters, or one for each row.

        Args:
            adapters: a name, None for the base, {name: weight}, or a composition of `peftcore.composition`; or a list
                of these with one for each row of the batch (for `generate`, one for each prompt).

        Returns:
            A context that yields the route. Other threads are not affected.

        Raises:
            AdapterNameError: a name is not loaded.
            RoutingError: adapters are merged, `disable_adapter()` is open, or the model's rows cannot be routed.
        """
        return activation.routed(self._module, adapters)

    def __call__(self, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: arguments of the model.
            adapter_names: the adapters for this call alone; see `route`.
            kwargs: arguments of the model, and of adapter methods, such as `task_ids`.

        Returns:
            The model's output.
        """
        if adapter_names is None and _CALLERS_ROUTE not in self.__dict__:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with self.route(adapter_names) if adapter_names is not None else self.__dict__[_CALLERS_ROUTE]():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    # -- merging -------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, in place; `unmerge_adapter` restores them bit for bit.

        Args:
            adapter_names: the adapters, in order; None for the active ones.
            safe_merge: check each merged weight for NaN and Inf before any weight is written.

        Raises:
            MergeError: an adapter cannot be merged, or a merged weight is not finite; nothing is changed then.
            AdapterNameError: a name is not loaded.
        """
        merge.merge_adapter(self._module, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the unmerged base weights, bit for bit."""
        merge.unmerge_adapter(self._module)

    @contextlib.contextmanager
    def merged(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> Iterator[None]:
        """Merge adapters for the time of a `with` block, so that forward passes cost what the base alone costs.

        It pays for `generate` with a base in 16 or 32 bits: merging and unmerging SmolLM2-135M takes 0.1 s. One copy of
        each merged weight is held meanwhile. On a quantised base the merged weights are quantised again, which changes
        the outputs; stay unmerged there. All threads see the merged weights.

        Args:
            adapter_names: the adapters, in order; None for the active ones.
            safe_merge: check each merged weight for NaN and Inf before any weight is written.

        Yields:
            Nothing. After the block, also after an error, the unmerged weights are back bit for bit.

        Raises:
            MergeError: adapters are merged already; or see `merge_adapter`.
            AdapterNameError: a name is not loaded.
        """
        with merge.merged(self._module, adapter_names, safe_merge):
            yield

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge adapters for good, and return the plain model with its original class.

        Args:
            progressbar: show a progress bar over the layers.
            safe_merge: see `merge_adapter`.
            adapter_names: see `merge_adapter`.

        Raises:
            MergeError: see `merge_adapter`.
        """
        return _as_plain(merge.merge_and_unload(self._module, safe_merge, adapter_names, progressbar))

    def unload(self) -> Any:
        """Remove all adapters, and return the base model with its original class and weights."""
        return _as_plain(merge.unload(self._module))

    def get_base_model(self) -> Any:
        """Return the model itself, with its adapters; `unload` returns the model without them."""
        return self

    # -- merging adapters into a new one ---------------------------------------------------------------------------

    def add_merged(
        self, adapter_name: str, weights: Mapping[str, float] | Composition, recipe: Recipe, rank: int | None = None
    ) -> LowRankReport:
        """Add a LoRA that is a weighted combination of other adapters; see `peftcore.merging.add_merged`.

        For example `add_merged("m", {"a": 0.7, "b": 0.3}, Recipe.ties(density=0.3), rank=16)`.

        Args:
            adapter_name: name of the new adapter.
            weights: {adapter: weight}, or a sum such as `0.7 * Only("a") + 0.3 * Only("b")`.
            recipe: the merging method.
            rank: the largest rank of a layer (count); None for no loss, or for the adapters' largest rank at the layer
                if the recipe needs dense weights.

        Returns:
            The rank and the relative error of each layer.

        Raises:
            MergeError: the adapters cannot be merged by this recipe.
            AdapterNameError: a name is not loaded, or the new name is taken.
        """
        by_name = weights_of(weights) if isinstance(weights, Composition) else weights
        return merging.add_merged(self._module, adapter_name, by_name, recipe, rank)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> LowRankReport:
        """Do `add_merged` with PEFT's arguments and meaning; see `peftcore.merging.add_weighted_adapter`."""
        svd = (svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        return merging.add_weighted_adapter(
            self._module, adapters, weights, adapter_name, combination_type, *svd, density, majority_sign_method
        )

    # -- saving --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **other: Any,
    ) -> None:
        """Save each adapter in PEFT's format: "default" in the directory itself, others in `<name>/`.

        Args:
            save_directory: the directory; created if it does not exist. An adapter's files are replaced together.
            safe_serialization: only True; other formats can run code when they are loaded.
            selected_adapters: names of the adapters to save; None for all.
            save_embedding_layers: whether to save the base's input and output embeddings, too. "auto": those that the
                adapter targets by the names `embed_tokens` or `lm_head`, and both if the vocabulary was resized.
            is_main_process: False writes nothing, and only takes part in gathering sharded tensors.
            path_initial_model_for_weight_conversion: a LoRA as it was saved before training. Each saved LoRA then
                subtracts it, as a plain LoRA of rank 2r for the original base. LoRAs that started from the base's
                weights in this process (PiSSA, OLoRA, CorDA) are always saved so.
            state_dict: a state dict of the model to take the values from; None for the model's own parameters.
            other: further options of transformers, only with values that mean one whole local file; and
                `save_function` and `max_shard_size`, which are warnings.

        Raises:
            ConfigError: an option has a value that is not supported.
            TypeError: an option is unknown.
            CheckpointError: the state dict lacks parameters of an adapter, or the initial adapter does not fit.
            AdapterNameError: a name is not loaded.
        """
        _check_saving(safe_serialization, other)
        initial = path_initial_model_for_weight_conversion
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        adapter_set(self._module).require(*names)
        for name in names:
            root = Path(save_directory)
            directory = root if name == "default" else root / name
            with contextlib.nullcontext() if initial is None else start_subtracted(self._module, name, initial):
                checkpoint.save_adapter(
                    self._module, name, directory, save_embedding_layers, state_dict, writes=is_main_process
                )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload the adapters, as `save_pretrained` writes them, with a model card, in one commit.

        Args:
            repo_id: "name" or "owner/name"; the repository is created if it does not exist.
            commit_message: first line of the commit's message; None for "Upload model".
            commit_description: the rest of the message.
            private: True for a private repository, if it is new; None for the owner's default.
            token: a token; None for the stored one.
            revision: branch to commit to, created if it does not exist.
            create_pr: True opens a pull request in place of a commit.
            max_shard_size: only the default, because an adapter is saved as one file.
            tags: tags to add to the model card.

        Returns:
            `huggingface_hub.CommitInfo`: a string, the commit's URL, with `pr_url` for a pull request.

        Raises:
            CheckpointError: the hub refuses the upload or cannot be reached; nothing is changed there.
            ConfigError: an option has a value that is not supported.
        """
        return hub.push(
            repo_id,
            self.save_pretrained,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=tags,
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write library, base model and tags of the adapters into a directory's model card; used by Trainer's push.

        Args:
            output_dir: the directory with the model card.
        """
        checkpoint.update_model_card(self._module, Path(output_dir))

    # -- training ------------------------------------------------------------------------------------------------

    def adapter_regularizer(self) -> Tensor | None:
        """Return the sum of the active adapters' regularisers, to add to each step's loss; None if there is none."""
        return self._sum_of_regularizers(adapter_set(self._module).selection.active)

    def _sum_of_regularizers(self, names: Iterable[str]) -> Tensor | None:
        adapters = adapter_set(self._module)
        terms = [
            term
            for name in names
            if (term := adapters.kinds[name].regularizer(adapters.configs[name], adapters.of_method(name))) is not None
        ]
        return torch.stack(terms).sum() if terms else None

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return the sum of the regularisers of adapters with `kasa_config`; 0.0 without one.

        Args:
            adapter_names: the adapters; None for the active ones.
        """
        return self._regularizers_with("kasa_config", adapter_names)

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """Return the sum of the regularisers of adapters with `monteclora_config`; 0.0 without one.

        Args:
            adapter_names: the adapters; None for the active ones.
        """
        return self._regularizers_with("monteclora_config", adapter_names)

    def _regularizers_with(self, option: str, adapter_names: str | list[str] | None) -> Tensor | float:
        """Return the sum of the regularisers of those adapters whose configuration has an option; 0.0 without one."""
        adapters = adapter_set(self._module)
        names = adapters.selection.active if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else names
        total = self._sum_of_regularizers(name for name in names if getattr(adapters.configs.get(name), option, None))
        return 0.0 if total is None else total

    def on_optimizer_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Run the active adapters' update of a training step, such as AdaLoRA's rank allocation.

        Call this method after each optimiser step and before `zero_grad`; `AdapterTrainer` calls it by itself.

        Args:
            step: number of the step, from 1.
            optimizer: the optimiser, with which a method may prune parameters together with their optimiser state. A
                model in DistributedDataParallel must be wrapped again after pruning. None: the method masks values
                instead of pruning.
        """
        adapters = adapter_set(self._module)
        for name in adapters.selection.active:
            adapters.kinds[name].on_step(adapters.configs[name], adapters.of_method(name), step, optimizer)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the training state that `save_pretrained` leaves out, for checkpoints: {"name/path/key": tensor}."""
        adapters = adapter_set(self._module)
        return {
            f"{name}/{path}/{key}": tensor
            for name in adapters.configs
            for path, adapter in adapters.adapters(name).items()
            for key, tensor in adapter.training_state().items()
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `adapter_state` returned.

        Args:
            state: {"name/path/key": tensor}.
        """
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for full_key, tensor in state.items():
            name, path, key = full_key.split("/")
            parts.setdefault((name, path), {})[key] = tensor
        for (name, path), values in parts.items():
            adapter_set(self._module).adapters(name)[path].load_training_state(values)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if `peftcore.convert_to_lora` can express an adapter as a LoRA, exactly or approximately.

        Args:
            adapter_name: the adapter.

        Raises:
            AdapterNameError: the adapter is not loaded.
        """
        return is_convertible(self._module, adapter_name)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Make the output of a model's input embeddings require gradients, so that they reach adapters of its blocks.

        Args:
            model: a transformers model; changed in place.

        Returns:
            The model.
        """
        model.enable_input_require_grads()
        return model

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the tensor that a prompt method saves: (tokens, token_dim) for prompt tuning.

        Args:
            adapter_name: the adapter.

        Raises:
            AdapterNameError: the adapter is not loaded.
            ConfigError: the adapter is not a prompt.
        """
        adapters = adapter_set(self._module)
        adapters.require(adapter_name)
        if (prompt := adapters.prompt(adapter_name)) is None:
            raise ConfigError(f"get_prompt_embedding_to_save: {adapter_name!r} is not a prompt")
        return prompt.checkpoint_tensors()["prompt_embeddings"]

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """The prompts by adapter name, under HF PEFT's name of this attribute; only with a prompt method."""
        if not len(prompts := adapter_set(self._module).prompts):
            raise AttributeError("prompt_encoder")
        return prompts

    def adapter_ranks(self, adapter_name: str | None = None) -> dict[str, int]:
        """Return the current ranks of one adapter.

        Args:
            adapter_name: the adapter; None for the first active one.

        Returns:
            {path of a layer: rank}, without layers of methods that have no rank.
        """
        adapters = adapter_set(self._module)
        names = adapters.selection.active[:1] if adapter_name is None else (adapter_name,)
        ranks = {path: adapter.rank for name in names for path, adapter in adapters.adapters(name).items()}
        return {path: rank for path, rank in ranks.items() if rank is not None}

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return what the active prompt adds to a call.

        Args:
            batch_size: rows (count).
            task_ids: the task of each row (batch_size,), for multitask prompt tuning.
            max_cache_len: only None; caches of fixed size get room for the prompt by themselves.

        Returns:
            The virtual tokens (batch_size, tokens, embedding width); for prefix tuning, a cache with the prefix.

        Raises:
            ConfigError: the active adapter is no prompt, or an argument does not fit it.
        """
        if max_cache_len is not None:
            raise ConfigError("get_prompt: max_cache_len must be None; caches get room for the prompt by themselves")
        adapters = adapter_set(self._module)
        prompt = adapters.prompt(self.active_adapter)
        if prompt is None:
            raise ConfigError(
                f"get_prompt: the active adapter {self.active_adapter!r} is {self.active_peft_config.peft_type}, which "
                "adds no prompt to the model's inputs; call set_adapter with the name of a prompt"
            )
        return prompt.for_rows(self._module, batch_size, {} if task_ids is None else {"task_ids": task_ids})

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of (trainable, all) parameters; inactive adapters do not count as trainable."""
        adapters = adapter_set(self._module)
        idle = [n for n in adapters.configs if n not in adapters.selection.active]
        unused = {id(p) for name in idle for p in adapters.parameters(name)}
        gguf = [module for module in self._module.modules() if isinstance(module, GgufLinear)]
        packed = {id(layer.weight): layer.in_features * layer.out_features for layer in gguf}
        counts = [
            (p.requires_grad and id(p) not in unused, packed.get(id(p), _count(p))) for p in self._module.parameters()
        ]
        return sum(count for trains, count in counts if trains), sum(count for _, count in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of `get_nb_trainable_parameters` in PEFT's format."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- integration with PyTorch ----------------------------------------------------------------------------------

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of tensors that DistributedDataParallel does not send, because every process has the same base.

        DistributedDataParallel reads this attribute. The names that a user gave to
        `_set_params_and_buffers_to_ignore_for_model` are included.
        """
        return [*untouched_names(self._module), *vars(self).get(_DDP_IGNORED, ())]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Iterable[str]) -> None:
        vars(self)[_DDP_IGNORED] = list(names)

    def _replicate_for_data_parallel(self) -> Any:
        """Make a replica. Its calls in another thread use the route that is open in this thread."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        selection = adapter_set(self._module).selection
        if (route := selection.route) is not None:
            replica.__dict__[_CALLERS_ROUTE] = lambda: selection.routed(copy.copy(route))
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so a pickle stores the plain class, and unpickling makes the subclass
        return _unpickled, (_plain_class(type(self)), vars(type(self)).get("model") is _BASE_MODEL), self.__dict__


_ONE_SHARD = ("50GB", "5GB", None)
"""Values of `max_shard_size` that are the defaults of libraries."""
_WHOLE_LOCAL_FILE: dict[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "token": (None,),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
}
"""{option of transformers' `save_pretrained`: supported values, which change nothing}"""


def _make_room(model: nn.Module, name: str, directory: Path, config: PeftConfig | None, reading: Reading) -> None:
    """Delete an adapter of a plain transformers model, so that a saved adapter can get its name, as in PEFT."""
    if name not in adapter_set(model).configs:
        return
    checkpoint.load_adapter(model, directory, f"another {name}", False, config, reading=reading)  # errors come here
    for one in (f"another {name}", name):
        inject.delete_adapter(model, one)
    warnings.warn(
        f"adapter {name!r} was loaded already, by transformers, and is replaced by the one of {directory}; to keep "
        "both, give the new one another adapter_name",
        stacklevel=4,
    )


def _check_saving(safe_serialization: Any, other: Mapping[str, Any]) -> None:
    if safe_serialization is not True:
        raise ConfigError(
            f"save_pretrained: safe_serialization must be True, since adapters are always saved as safetensors; got "
            f"{safe_serialization!r:.200}. Names of adapters are selected_adapters="
        )
    for name, value in other.items():
        if name == "save_function":
            warnings.warn(
                "save_pretrained: save_function is not called, because all files of an adapter are replaced together; "
                "is_main_process decides which process writes",
                stacklevel=3,
            )
            continue
        if name == "max_shard_size":
            if value not in _ONE_SHARD:
                warnings.warn(
                    f"save_pretrained: max_shard_size={value!r:.200} has no effect, because an adapter is saved as one "
                    "file",
                    stacklevel=3,
                )
            continue
        if name not in _WHOLE_LOCAL_FILE:
            raise TypeError(f"save_pretrained() has no option {name!r}")
        if value not in _WHOLE_LOCAL_FILE[name]:
            raise ConfigError(
                f"save_pretrained: {name}={value!r:.200} is not supported: an adapter is saved as one local file in "
                "PEFT's format; leave it out (push_to_hub is a method of its own)"
            )


def _count(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter; a 4-bit parameter packs two into each byte."""
    if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8:
        return 2 * parameter.numel()
    return parameter.numel()


@cache
def _adapted_class(plain: type, shows_base: bool, /) -> type:
    """Return the subclass `(PeftModel, plain)`.

    Args:
        plain: the model's own class.
        shows_base: True for a model without an attribute `model` of its own; see `_BaseModel`.
    """
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    extra = {"generate": _generate, "create_masks_for_generate": _masks} if hasattr(plain, "generate") else {}
    extra |= {name: _with_own_base_model(plain, name) for name in _BASE_MODEL_READERS if hasattr(plain, name)}
    extra |= {one.name: one for one in _FROM_ADAPTERS if not hasattr(plain, one.name)}
    if shows_base:
        extra["model"] = _BASE_MODEL
    if hasattr(plain, "from_pretrained"):
        extra["from_pretrained"] = _from_pretrained_of(plain)
    return type(
        plain.__name__,
        (PeftModel, plain),
        {
            **names,
            **extra,
            "__init__": _init_of(plain),
            "base_model": property(_base_model_of(plain)),
            "forward": _forward_of(plain),
            "_hf_peft_config_loaded": True,
        },
    )


class _BaseModel:
    """`model` of PEFT's models, the base model: here a view; see `peftcore.injection.base_view`."""

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            raise AttributeError("model")
        for tensors_or_modules in (model._parameters, model._buffers, model._modules):  # set after get_peft_model
            if "model" in tensors_or_modules:
                return tensors_or_modules["model"]
        adapters = model.__dict__.get(ATTRIBUTE)
        if adapters is None or adapters.selection.cache.calls or _OWN_BASE_MODEL.get() or is_compiling():
            raise AttributeError("model")  # code of the model itself asks whether it has such an attribute
        return view_of(model, _adapted_class(_plain_class(owner), False))


_BASE_MODEL = _BaseModel()


def _shared(model: Any, name: str) -> Mapping[str, Tensor] | None:
    tensors = SharedTensors(model, name) if ATTRIBUTE in model.__dict__ else None
    return tensors or None


class _FromAdapters:
    """An attribute of PEFT's models that follows from the adapters, unless the model itself has such an attribute.

    Args:
        name: the attribute's name.
        value: function of the model; None if its adapters do not have the attribute.
    """

    def __init__(self, name: str, value: Callable[[Any], Any]):
        self.name, self._value = name, value

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            raise AttributeError(self.name)
        for tensors_or_modules in (model._parameters, model._buffers, model._modules):
            if self.name in tensors_or_modules:
                return tensors_or_modules[self.name]
        value = self._value(model)
        if value is None:
            raise AttributeError(self.name)
        return value


_FROM_ADAPTERS = (
    _FromAdapters("prefix", lambda model: tuner_model(model).prefix),
    *(_FromAdapters(name, partial(_shared, name=name)) for name in SHARED_TENSORS),
)
"""Attributes such as `prefix`, "lora_", and `vera_A`, {adapter: matrix A of all layers}."""


_BASE_MODEL_READERS = (
    "get_decoder",
    "get_encoder",
    "get_input_embeddings",
    "set_decoder",
    "set_encoder",
    "set_input_embeddings",
)
"""Methods of transformers that read `base_model` and mean the model without its head."""
_OWN_BASE_MODEL: ContextVar[bool] = ContextVar("peftcore_own_base_model", default=False)
"""True while `base_model` is that of the model's own class."""


def _init_of(plain: Any) -> Any:
    """Return the class's own `__init__`, which does nothing if `PeftModel(model, config)` has returned the model."""

    @wraps(plain.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if self is not kwargs.get("model", args[0] if args else None):
            plain.__init__(self, *args, **kwargs)

    return init


def _base_model_of(plain: Any) -> Any:
    """Return the getter of `base_model`: the view of PEFT, with the model as `base_model.model`."""

    def base_model(self: Any) -> Any:
        own = getattr(plain, "base_model", None)
        adapters = self.__dict__.get(ATTRIBUTE)
        # code inside of a forward pass, such as TRL's, means the model without its head
        if own is not None and (adapters is None or adapters.selection.cache.calls or _OWN_BASE_MODEL.get()):
            return own.__get__(self)
        return tuner_model(self)

    return base_model


def _with_own_base_model(plain: Any, name: str) -> Any:
    """Return a method of the class that reads `base_model` as transformers defines it."""
    own = getattr(plain, name)

    @wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _OWN_BASE_MODEL.set(True)
        try:
            return own(self, *args, **kwargs)
        finally:
            _OWN_BASE_MODEL.reset(token)

    return method


def _from_pretrained_of(plain: Any) -> Any:
    """Return `PeftModel.from_pretrained` for a model as its first argument, else the class's own method."""

    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module):
            return PeftModel.from_pretrained(model, *args, **kwargs)
        return plain.from_pretrained.__func__(cls, model, *args, **kwargs)

    return classmethod(from_pretrained)


def _forward_of(plain: Any) -> Any:
    """Return the class's own `forward`, with its own signature, for a model with adapters.

    PyTorch does not run hooks if `forward` is called directly. Adapters may need the hooks, so such a call becomes a
    call of the model.
    """

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_hooks.needs_call(self, kwargs):
            return self(*args, **kwargs)
        return plain.forward(self, *args, **kwargs)

    return forward


def _generate(self: Any, *args: Any, adapter_names: Spec | Sequence[Spec] = None, **kwargs: Any) -> Any:
    route = contextlib.nullcontext() if adapter_names is None else self.route(adapter_names)
    with route, unchanging_weights(), forward_hooks.generation(self, kwargs, *args[:1]) as arguments:
        return _plain_class(type(self)).generate(self, *args, **arguments)


def _masks(self: Any, **kwargs: Any) -> Any:
    """Make the masks of a static cache for `generate`; with a prompt, the forward makes them later."""
    if adapter_set(self).prompts_in_effect():
        return kwargs["attention_mask"]
    from transformers.masking_utils import create_masks_for_generate

    own = super(PeftModel, self)
    return getattr(own, "create_masks_for_generate", create_masks_for_generate)(**kwargs)


def _plain_class(adapted: type) -> type:
    return adapted.__mro__[adapted.__mro__.index(PeftModel) + 1]


def _unpickled(plain: type, shows_base: bool = False) -> Any:
    teach_trainer()
    return object.__new__(_adapted_class(plain, shows_base))


def _as_peft_model(model: nn.Module) -> Any:
    if not isinstance(model, PeftModel):
        has_own = hasattr(model, "model")
        if has_own and (inner := _inner_model(model)) is not None:
            show_model(inner, model)
        model.__class__ = _adapted_class(type(model), not has_own)
    teach_trainer()
    return model


def _inner_model(model: nn.Module) -> Any:
    """Return the model without its head of a transformers model that calls it `model`; None for other models."""
    inner = model._modules.get("model")
    return inner if getattr(model, "base_model_prefix", None) == "model" else None


def _as_plain(model: nn.Module) -> Any:
    if isinstance(model, PeftModel):
        model.__class__ = _plain_class(type(model))
        if (inner := _inner_model(model)) is not None:
            hide_model(inner)
        vars(model).pop(IS_MIXED, None)
    return model


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Add an untrained adapter to a model, and make it the active one.

    The base is frozen, and the adapter is trainable. As with PEFT, the adapter is in training mode, so its dropout is
    on at once, and the base keeps its mode. On an error the model stays as it was.

    Args:
        model: the base model; changed in place.
        peft_config: the configuration; with `inference_mode` the adapter is not trainable.
        adapter_name: the adapter's name. A loaded adapter of this name is replaced, with a warning.
        mixed: True makes the model an instance of `PeftMixedModel`, too. Adapters of different methods fit into every
            model, so nothing else depends on it.
        autocast_adapter_dtype: True: float32 parameters on layers of 16 bits; False: the dtype of the layers.
        revision: revision of the base model, to be saved in the adapter's configuration; None for the configuration's.
        low_cpu_mem_usage: True leaves the parameters on the meta device, until a saved adapter is read into them.

    Returns:
        The model, as a `PeftModel`.

    Raises:
        ConfigError: an option does not fit the model.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        AdapterNameError: the name is not valid.
    """
    if not isinstance(mixed, bool):
        raise ConfigError(f"get_peft_model: mixed must be True or False; got {mixed!r:.200}")
    if revision is not None and isinstance(peft_config, PeftConfig):
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"get_peft_model: revision={revision!r} is used in place of the configuration's "
                f"{peft_config.revision!r}",
                stacklevel=2,
            )
        peft_config = dataclasses.replace(peft_config, revision=revision)
    name = model.__dict__.get("name_or_path")
    if name and isinstance(peft_config, PeftConfig) and peft_config.base_model_name_or_path is None:
        peft_config = dataclasses.replace(peft_config, base_model_name_or_path=name)
    creation = Creation(autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    inject.inject_untrained(model, peft_config, adapter_name, creation)
    if mixed:
        vars(model)[IS_MIXED] = True
    return _as_peft_model(model)


_UNUSED = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "torch_dtype", "dtype")
"""Options that scripts give to PEFT's `from_pretrained`, and that concern the base model."""
_READING_OPTIONS = ("torch_device", "strict", "ignore_mismatched_sizes")


def _split_reading(function: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
        name = next(iter(others))
        raise TypeError(f"{function}() has no option {name!r}{suggestion(name, [*hub.OPTIONS, *_READING_OPTIONS])}")
    return options, further


def _with_experts(
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
        raise ConfigError(
            f"{function}: adapters is an option of X-LoRA; the adapter is {saved.peft_type}, leave it out"
        )
    return dataclasses.replace(saved, adapters=dict(experts))  # type: ignore[call-arg]


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Prepare a 4- or 8-bit model for training adapters.

    All parameters are frozen, 16-bit ones are cast to float32, and gradient checkpointing is enabled. Checkpointing is
    non-reentrant, and the output of the embeddings requires grad, so that gradients reach the adapters. As in HF PEFT,
    nothing is cast beside torchao's, HQQ's, GPTQ's and AWQ's layers, because they multiply inputs of their own dtype.

    Args:
        model: the quantised model; changed in place.
        use_gradient_checkpointing: True enables gradient checkpointing.
        gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: True returns the memory of the former 16-bit parameters to the device after the cast.

    Returns:
        The model.
    """
    casts = not has_uncast_inputs(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if casts and parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            warnings.warn(
                "reentrant checkpointing gives no gradients through a frozen base; use_reentrant=False",
                stacklevel=2,
            )
        transformer: Any = model
        transformer.activation_checkpointing_enable(kwargs)
        transformer.enable_input_require_grads()
    return model
