"""`TunerModel`: the object between a `PeftModel` and its base in HF PEFT, as a view: `model.base_model.model`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from peftcore._util.unneeded_replacements import is_unneeded
from peftcore.config import PeftConfig
from peftcore.detection.model_kind import model_config_of
from peftcore.errors import AdapterNameError, ConfigError, PeftError
from peftcore.injection import activation, inject, merge
from peftcore.injection.adapter_set import adapter_set, shared_by
from peftcore.injection.preparation import Creation
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.peft_attributes import shared_tensor
from peftcore.layers.trained_bias import TrainedBias

_CLASSES: dict[str, type["TunerModel"]] = {}
_PREFIXES = {"ADALORA": "lora_", "LOHA": "hada_", "PVERA": "pvera_lambda_", "VERA": "vera_lambda_"}
"""{method: prefix of its parameter names}, for methods whose prefix is not the method's name"""
_OF_THE_WHOLE_MODEL = ("num_parameters", "push_to_hub", "save_pretrained")
"""Methods that a `TunerModel` takes from the model with its head."""

_CHAINED = (
    *("apply", "bfloat16", "cpu", "cuda", "double", "eval", "float", "half", "requires_grad_", "to", "train", "type"),
    *("to_empty", "xpu"),
)
"""Methods of nn.Module that return the module itself, here the view."""
_NEVER_CALLED = (
    "_cast_adapter_dtype",
    "_check_target_module_exists",
    "_create_and_replace",
    "_create_and_replace_parameter",
    "_create_new_module",
    "_mark_only_adapters_as_trainable",
    "_post_injection_hook",
    "_pre_injection_hook",
    "_prepare_adapter_config",
    "_prepare_model",
    "_replace_module",
    "forward",
    "inject_adapter",
)
"""Methods of HF PEFT's models that make layers and compute outputs; here, the layers and the model do."""
_REASON = (
    "peftcore never calls it; subclass peftcore.adapter.Adapter and register it by peftcore.registry.register for a "
    "method of your own"
)

SHARED_TENSORS = (
    *("frod_V", "pvera_A", "pvera_B", "randlora_A", "randlora_B", "unilora_theta_d", "vblora_vector_bank"),
    *("vera_A", "vera_B"),
)
"""Attributes of HF PEFT's models that hold tensors which the layers of an adapter share."""


def parameter_prefix(peft_type: str) -> str:
    """Return the prefix of a method's parameter names in HF PEFT, such as "lora_"."""
    return _PREFIXES.get(peft_type, f"{peft_type.lower()}_")


def _refuse_call(name: str, *args: Any, **kwargs: Any) -> None:
    raise PeftError(f"{name} makes layers of HF PEFT, and cannot be called: get_peft_model makes those of peftcore")


class _Prefix:
    """The attribute `prefix` of a `TunerModel` and of its class."""

    def __get__(self, view: "TunerModel | None", owner: type["TunerModel"]) -> str:
        if view is None:
            return parameter_prefix(owner.peft_type) if owner.peft_type else ""
        first = next(iter(view.peft_config.values()), None)
        return "" if first is None else parameter_prefix(first.peft_type)


class _OfTunerModels(type):
    """Metaclass of `TunerModel`, which refuses methods that a program sets and peftcore would never call."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in _NEVER_CALLED:
            if is_unneeded(value):
                return
            raise PeftError(f"{cls.__name__}.{name} cannot be set: {_REASON}")
        super().__setattr__(name, value)

    def __getattr__(cls, name: str) -> Any:
        if name in _NEVER_CALLED:
            return partial(_refuse_call, f"{cls.__name__}.{name}")
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


class TunerModel(metaclass=_OfTunerModels):
    """A view on a model with adapters.

    An attribute is read from the model without its head if it is defined there, otherwise from the model. Methods that
    save or count are those of the model. `to`, `eval` and similar methods return the view.

    Each method of HF PEFT has a subclass, such as `peftcore.LoraModel`, whose call adds an adapter to a model without
    changing the model's class, and makes it the active one: `LoraModel(model, config, "default")`.

    Args:
        model: a model; changed in place if a configuration is given.
        config: the configuration of a new adapter, or {adapter name: configuration}; None if the model has adapters.
        adapter_name: the name of the new adapter; of several, the one that becomes active.
        low_cpu_mem_usage: see `inject_adapter_in_model`.
        state_dict: see `inject_adapter_in_model`.
        peft_config: HF PEFT's other name of `config`.

    Raises:
        ConfigError: an option does not fit the model.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        PeftError: the class is a subclass that defines methods by which HF PEFT makes layers.
        AdapterNameError: the name is not valid; or no configuration is given, and the model has no adapters.
    """

    peft_type: ClassVar[str] = ""
    """Name of the method on disk."""
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | dict[str, PeftConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        peft_config: PeftConfig | dict[str, PeftConfig] | None = None,
    ):
        if own := [name for name in _NEVER_CALLED if _defined(type(self), name) is not vars(TunerModel).get(name)]:
            raise PeftError(f"{type(self).__name__} cannot be made, because it defines {own[0]}: {_REASON}")
        if config is not None and peft_config is not None:
            raise ConfigError(f"{type(self).__name__}: config and peft_config are two names of one argument; give one")
        config = peft_config if config is None else config
        configs = {adapter_name: config} if isinstance(config, PeftConfig) else config or {}
        for name, one in sorted(configs.items(), key=lambda item: item[0] == adapter_name):  # the last one is active
            inject.inject_adapter_in_model(one, model, name, low_cpu_mem_usage, state_dict)
        adapter_set(model)
        vars(self)["model"] = model

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "peft_type" in vars(cls):
            _CLASSES[cls.peft_type] = cls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model":  # `model` is not there yet while a copy is made
            raise AttributeError(name)
        model = self.model
        if name in _CHAINED:
            return partial(self._chained, getattr(model, name))
        # transformers reads other attributes of the model without its head here
        if not hasattr(nn.Module, name) and name not in _OF_THE_WHOLE_MODEL:
            headless = model._modules.get(getattr(model, "base_model_prefix", ""))
            if headless is not None and hasattr(headless, name):
                return getattr(headless, name)
        try:
            return getattr(model, name)
        except AttributeError:
            if name.startswith("_") or not (tensors := SharedTensors(model, name)):
                raise
            return tensors

    def _chained(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> "TunerModel":
        method(*args, **kwargs)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) as `nn.Module.named_parameters`, with names such as "model.lin0.weight"."""
        return self.model.named_parameters(_below(prefix), recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, buffer) as `nn.Module.named_buffers`, with names such as "model.norm.running_mean"."""
        return self.model.named_buffers(_below(prefix), recurse, remove_duplicate)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, module) as `nn.Module.named_modules`: the view, the model as "model", and its submodules."""
        yield prefix, self
        yield from self.model.named_modules(memo, _below(prefix), remove_duplicate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.model!r})"

    prefix = _Prefix()
    """Start of the names of the parameters of the first adapter's method, such as "lora_"; "" without adapters.

    The attribute of a class, such as `LoraModel.prefix`, is that of its method."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """{adapter: configuration}."""
        return adapter_set(self.model).configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return list(adapter_set(self.model).selection.active)

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters, in order."""
        return self.active_adapters

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return a model's configuration as a dictionary, `NO_MODEL_CONFIG` if the model has none.

        Args:
            model: a model whose attribute `config` is a configuration of transformers, a dataclass or a dictionary.
        """
        return model_config_of(model)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers with adapters, without raw parameters."""
        return [path for path, slot in _adapted(self.model) if slot.base.kind != "parameter"]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the raw parameters with adapters."""
        return [path for path, slot in _adapted(self.model) if slot.base.kind == "parameter"]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; see `PeftModel.set_adapter`."""
        activation.set_adapter(self.model, adapter_name, inference_mode)

    def enable_adapter_layers(self) -> None:
        """Enable the active adapters again after `disable_adapter_layers`."""
        activation.switch_adapters(self.model, on=True)

    def disable_adapter_layers(self) -> None:
        """Disable the active adapters, in every thread; see `PeftModel.disable_adapters`."""
        activation.switch_adapters(self.model, on=False)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter whose configuration a script has set: `base_model.peft_config["b"] = LoraConfig()`.

        As in HF PEFT, the adapter is not active; call `set_adapter`. After an error the configuration is not set.

        Args:
            model: HF PEFT's `base_model.model`, the model itself.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: see `PeftModel.add_adapter`.
            low_cpu_mem_usage: see `PeftModel.add_adapter`.
            state_dict: see `inject_adapter_in_model`.

        Raises:
            ConfigError: an option does not fit the model.
            TargetError: no layer matches, or a matching layer cannot be adapted.
            AdapterNameError: the name is not valid, has no configuration, or is that of a loaded adapter.
        """
        adapters = adapter_set(self.model)
        adapters.require(adapter_name)
        if adapter_name in adapters.kinds:
            raise AdapterNameError(f"inject_adapter: adapter {adapter_name!r} is loaded already; take another name")
        config = adapters.configs.pop(adapter_name)
        creation = Creation(autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        if state_dict is not None:
            config = inject.with_targets_of(config, state_dict, self.model)
        inject.add_adapter(self.model, config, adapter_name, creation)
        activation.set_requires_grad(self.model, adapter_name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see `PeftModel.delete_adapter`."""
        activation.delete_adapter(self.model, adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of all parameters of adapters; see `PeftModel.set_requires_grad`."""
        names = adapter_names if isinstance(adapter_names, str) else list(adapter_names)
        activation.set_requires_grad(self.model, names, requires_grad)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the parameters of the base, for scripts that call this after they changed `requires_grad`.

        Args:
            model: HF PEFT's `base_model.model`, the model itself.
        """
        of_adapters = {id(tensor) for tensor in adapter_set(self.model).tensors()}
        for parameter in model.parameters():
            if id(parameter) not in of_adapters:
                parameter.requires_grad_(False)

    def update_and_allocate(self, global_step: int) -> None:
        """Run the active adapters' update of a training step.

        An example is AdaMSS's choice of the subspaces that continue to train.

        Call it after each optimiser step and before `zero_grad`; see `PeftModel.on_optimizer_step`.

        Args:
            global_step: number of the step.
        """
        adapters = adapter_set(self.model)
        for name in adapters.selection.active:
            adapters.kinds[name].on_step(adapters.configs[name], adapters.of_method(name), global_step, None)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights; see `PeftModel.merge_adapter`."""
        merge.merge_adapter(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the unmerged base weights."""
        merge.unmerge_adapter(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters for good, and return the plain model; see `PeftModel.merge_and_unload`."""
        if hasattr(self.model, "merge_and_unload"):  # a `PeftModel`, whose class changes back
            return self.model.merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[operator]
        return merge.merge_and_unload(self.model, safe_merge, adapter_names, progressbar)

    def unload(self) -> nn.Module:
        """Remove all adapters, and return the base model with its weights; see `PeftModel.unload`."""
        if hasattr(self.model, "unload"):
            return self.model.unload()  # type: ignore[operator]
        return merge.unload(self.model)


class SharedTensors(Mapping[str, Tensor]):
    """{adapter: tensor that its layers share} of the adapters that the model has at each access.

    Args:
        model: a model with adapters.
        name: HF PEFT's name of the tensor, such as "vblora_vector_bank".
    """

    def __init__(self, model: nn.Module, name: str):
        self._model, self._name = model, name

    def __getitem__(self, adapter: str) -> Tensor:
        adapters = adapter_set(self._model)
        shared = shared_by(adapters.adapters(adapter)) if adapter in adapters.configs else None
        tensor = None if shared is None else shared_tensor(shared, self._name)
        if tensor is None:
            raise KeyError(adapter)
        return tensor

    def __contains__(self, adapter: object) -> bool:
        try:
            self[str(adapter)]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (adapter for adapter in adapter_set(self._model).configs if adapter in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{self._name}: {dict(self)!r}"


def _defined(cls: type, name: str) -> Any:
    """Return what a class or a base class of it defines under a name; None if nothing."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _below(prefix: str) -> str:
    """Return the path of the attribute `model` of a module at the path `prefix`."""
    return f"{prefix}.model" if prefix else "model"


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdapterSlot]]:
    """Yield (path, slot) of the slots that `target_modules` and `target_parameters` name."""
    for path, slot in adapter_set(model).layers.items():
        parts = (slot.adapters[name] for name in slot.adapters)
        if any(not isinstance(part, TrainedBias) and not part.disk_prefix.startswith("token") for part in parts):
            yield path, slot


def tuner_model(model: nn.Module) -> TunerModel:
    """Return the view on a model with adapters, of the class of its first adapter's method."""
    first = next(iter(adapter_set(model).configs.values()), None)
    kind = _CLASSES.get(getattr(first, "peft_type", ""), TunerModel)
    view = object.__new__(kind)
    vars(view)["model"] = model
    return view
