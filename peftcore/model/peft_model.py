"""`PeftModel` itself: the making of one, its call, its class, and its integration with PyTorch."""

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial, wraps
from typing import Any

from torch import nn

from peftcore.composition.algebra import Spec
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError
from peftcore.files import hub
from peftcore.files.tensors import PREFIX
from peftcore.injection import forward_hooks, inject, merge
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set, untouched_names
from peftcore.injection.base_view import hide_model, show_model, view_of
from peftcore.injection.preparation import Creation
from peftcore.model.activation import ActivationMethods
from peftcore.model.generation import generate_of, masks_of
from peftcore.model.hf_attributes import BaseModelView, attributes_of
from peftcore.model.inspection import InspectionMethods
from peftcore.model.loading import LoadingMethods, make_room, split_reading, with_experts
from peftcore.model.merging import MergingMethods
from peftcore.model.saving import SavingMethods
from peftcore.model.training import TrainingMethods
from peftcore.storage import checkpoint
from peftcore.storage.reading import Reading, check_offload
from peftcore.storage.trainer_checkpoints import teach_trainer

_CALLERS_ROUTE = "_callers_route"
"""Attribute of a DataParallel replica that was made inside of a route: a function that opens the route."""
IS_MIXED = "_is_mixed"
"""Attribute of a model that was made with `mixed=True`."""
_PLAIN_CLASS = "_plain_class"
"""Attribute of the class of a model with adapters that holds the model's own class."""
_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model in which DistributedDataParallel stores the names of tensors that it does not send."""


class PeftModel(LoadingMethods, ActivationMethods, MergingMethods, SavingMethods, TrainingMethods, InspectionMethods):
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
            adapter_name: the adapter's name in this model. A loaded adapter of this name is replaced, with a warning,
                as in PEFT.
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
            AdapterNameError: the name is not valid.
            MergeError: a loaded adapter of this name is merged.
            ConfigError: an option has a value that does not fit.
            TypeError: an option is unknown.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"PeftModel.from_pretrained needs the base model first, then the adapter; got {model!r:.200}"
            )
        _check_attributes(model)
        experts = kwargs.pop("adapters", None)
        options, further = split_reading("from_pretrained", kwargs)
        config = with_experts("from_pretrained", config, model_id, experts, options)
        check_offload(ephemeral_gpu_offload)
        reading = Reading(autocast_adapter_dtype, low_cpu_mem_usage, key_mapping=key_mapping, **further)
        directory = hub.adapter_directory(model_id, needs_config=config is None, **options)
        with hub.naming_download(model_id):
            if ATTRIBUTE in model.__dict__:
                make_room(model, adapter_name, directory, config, reading)
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

    def get_submodule(self, target: str) -> nn.Module:
        """Return the submodule at a path of this model, or of HF PEFT's, which begins with `base_model.model`.

        Raises:
            AttributeError: there is no such submodule.
        """
        if target.startswith("base_model."):
            with suppress(AttributeError):  # HF PEFT's path with an adapter of a prompt
                return super().get_submodule(target.removeprefix("base_model."))  # type: ignore[misc]
        return super().get_submodule(target.removeprefix("base_model.model."))  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of this model, or that of the same model with HF PEFT's adapters.

        Args:
            state_dict: {name: tensor}; names may begin with `base_model.model`, as in HF PEFT.
            strict: True makes missing and unexpected names an error.
            assign: True takes the tensors themselves in place of their values.

        Returns:
            The missing and the unexpected names.

        Raises:
            RuntimeError: a tensor has another shape; or, with `strict`, names are missing or unexpected.
        """
        if state_dict and all(name.startswith(PREFIX) for name in state_dict):
            state_dict = {
                name.removeprefix(PREFIX).replace(".original_module.", ".base_layer."): tensor
                for name, tensor in state_dict.items()
            }
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]

    def get_base_model(self) -> Any:
        """Return the model as an object of its own class, which shares all submodules and attributes with this model.

        The adapters stay in the layers; `unload` returns the model without them. The methods are those of the model's
        own class, as in HF PEFT: `save_pretrained` saves the model's tensors in place of the adapters.
        """
        return view_of(self._module, _plain_class(type(self)))

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
        shows_base = isinstance(vars(type(self)).get("model"), BaseModelView)
        return _unpickled, (_plain_class(type(self)), shows_base), self.__dict__


@cache
def _adapted_class(plain: type, shows_base: bool, /) -> type:
    """Return the subclass `(PeftModel, plain)`.

    Args:
        plain: the model's own class.
        shows_base: True for a model without an attribute `model` of its own; see `BaseModelView`.
    """
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    extra = attributes_of(plain)
    if hasattr(plain, "generate"):
        extra |= {"generate": generate_of(plain), "create_masks_for_generate": masks_of(plain)}
    if shows_base:
        extra["model"] = BaseModelView(partial(_adapted_class, plain, False))
    if hasattr(plain, "delete_adapters"):
        extra["delete_adapters"] = _delete_adapters_of(plain)
    if hasattr(plain, "from_pretrained"):
        extra["from_pretrained"] = _from_pretrained_of(plain)
    return type(
        plain.__name__,
        (PeftModel, plain),
        {
            **names,
            **extra,
            "__init__": _init_of(plain),
            "forward": _forward_of(plain),
            "_hf_peft_config_loaded": True,
            _PLAIN_CLASS: plain,
        },
    )


def _init_of(plain: Any) -> Any:
    """Return the class's own `__init__`, which does nothing if `PeftModel(model, config)` has returned the model."""

    @wraps(plain.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if self is not kwargs.get("model", args[0] if args else None):
            plain.__init__(self, *args, **kwargs)

    return init


def _from_pretrained_of(plain: Any) -> Any:
    """Return `PeftModel.from_pretrained` for a model as its first argument, else the class's own method."""

    def from_pretrained(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module):
            return PeftModel.from_pretrained(model, *args, **kwargs)
        return plain.from_pretrained.__func__(cls, model, *args, **kwargs)

    return classmethod(from_pretrained)


def _delete_adapters_of(plain: Any) -> Any:
    """Return diffusers' method `delete_adapters`, which deletes from each layer, for a model with adapters."""

    @wraps(plain.delete_adapters)
    def delete_adapters(self: Any, adapter_names: list[str] | str) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        inject.delete_adapter_and_activate(self, *(name for name in names if name in self.peft_config))
        plain.delete_adapters(self, [])  # renews the hooks of diffusers' offloading

    return delete_adapters


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


def _plain_class(adapted: type) -> type:
    return getattr(adapted, _PLAIN_CLASS)


def _unpickled(plain: type, shows_base: bool = False) -> Any:
    teach_trainer()
    return object.__new__(_adapted_class(plain, shows_base))


def _check_attributes(model: nn.Module) -> None:
    """Raise ConfigError if an attribute of `PeftModel` would hide a module or a tensor of the model's own."""
    own = (*model._modules, *model._parameters, *model._buffers)
    # `prompt_encoder`, as SAM calls a module, hides none: without prompts, PeftModel's property gives way to it
    hidden = [name for name in own if hasattr(PeftModel, name) and name != "prompt_encoder"]
    if hidden and not isinstance(model, PeftModel):
        raise ConfigError(
            f"{type(model).__name__} has a module or a tensor named {hidden[0]!r}, as an attribute of PeftModel is "
            "named; rename it, or call inject_adapter_in_model, which does not change the model's class"
        )


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
        TypeError: the first argument is not a model.
        ConfigError: an option does not fit the model, or a module or tensor of the model has the name of an attribute
            of `PeftModel`.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        AdapterNameError: the name is not valid.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"get_peft_model needs the base model first, then the configuration; got {model!r:.200}; load a model by "
            "the from_pretrained of its class"
        )
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
    _check_attributes(model)
    name = model.__dict__.get("name_or_path")
    if name and isinstance(peft_config, PeftConfig) and peft_config.base_model_name_or_path is None:
        peft_config = dataclasses.replace(peft_config, base_model_name_or_path=name)
    creation = Creation(autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    inject.inject_untrained(model, peft_config, adapter_name, creation)
    if mixed:
        vars(model)[IS_MIXED] = True
    return _as_peft_model(model)
