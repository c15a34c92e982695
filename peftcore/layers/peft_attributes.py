"""The attributes of HF PEFT's layers, as views on an adapter slot.

In HF PEFT a layer holds one dictionary per parameter, `layer.lora_A["default"].weight`. Here an adapter holds all its
parameters, and `layer.lora_A` is a view: {adapter name: element}. An element is the parameter itself
(`layer.ia3_l["default"]`), a number (`layer.scaling["default"]`), or a module: the adapter's own
(`layer.lora_dropout["default"]`), or one that shows its parameters (`factor_view.py`). Writing an element changes the
adapter. Views of tensors and modules are submodules of the layer (`named_tensors.py`); those of numbers are made at
each access.
"""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from peftcore.adapter import Adapter, Shared
from peftcore.bases.plain import Conv1DWeight
from peftcore.config import options_at
from peftcore.errors import AdapterNameError, ConfigError, PeftError
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.factor_view import FactorView, factor_view
from peftcore.layers.switching import MergingMethods
from peftcore.layers.trained_bias import TrainedBias
from peftcore.registry import method_named

IN_A_MODULE = ("lora_magnitude_vector",)
"""Attributes that hold a module with a `weight` in HF PEFT's layers, while the keys on disk have no "weight"."""
_COMPUTED = ("scaling", "trainable_tokens_original")
"""Attributes of adapters that are shown although they may be tensors and no parameters, besides buffers whose
names begin with the method's."""
_OF_EACH_LORA_LAYER = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""Attributes that all layers of LoRA have in HF PEFT, empty if they do not fit the layer."""
TOKENS_LAYER = "TrainableTokensLayer"
"""Class of HF PEFT's layers of trained rows."""
_NUMBERS = {"r": "rank"}
"""{attribute of HF PEFT's layers: attribute of an adapter}, where the two names differ"""


class PerAdapter(MutableMapping[str, Any]):
    """{adapter name: element} of one attribute, over the adapters of a slot that have the attribute.

    Args:
        slot: the slot of a layer.
        attribute: the attribute's name in HF PEFT's layer, such as "lora_A" or "scaling".
    """

    def __init__(self, slot: AdapterSlot, attribute: str):
        self._slot, self._attribute = slot, attribute

    def __getitem__(self, name: str) -> Any:
        if name in self._slot.adapters and has_attribute(self._slot.adapters[name], self._attribute):
            return _element(self._slot.adapters[name], self._attribute)
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self:
            raise PeftError(
                f"{self._attribute}[{name!r}]: the layer has no such adapter; add one by add_adapter(name, config)"
            )
        adapter = self._slot.adapters[name]
        parameters = _parameters(adapter, self._attribute)
        attribute = _NUMBERS.get(self._attribute, self._attribute)
        if parameters == {"": self._attribute}:
            shape = tuple(adapter.shown_parameter(self._attribute).shape)
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ConfigError(
                    f"{self._attribute}[{name!r}] must be a tensor of shape {shape}; got {type(value).__name__} of "
                    f"shape {tuple(getattr(value, 'shape', ()))}"
                )
            # a plain tensor becomes a parameter, as in nn.ParameterDict
            setattr(adapter, self._attribute, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        elif not parameters and isinstance(vars(adapter).get(attribute), int | float | Tensor) and attribute != "rank":
            if attribute == "scaling":
                _start_scaling(adapter)
                value = value if adapter.scaling_unit == 1 else value / adapter.scaling_unit
            setattr(adapter, attribute, value)
        elif _is_dropout(adapter, self._attribute) and isinstance(value, nn.Dropout | nn.Identity):
            adapter._modules.pop("dropout", None)
            if isinstance(value, nn.Dropout):
                adapter.add_module("dropout", value)
            adapter.mark_changed()
            self._slot.adapters[name] = adapter  # shows the new module
        elif isinstance(value, nn.Module) and isinstance(shown := self[name], FactorView):
            _take_tensors(shown, value, f"{self._attribute}[{name!r}]")
        else:
            raise PeftError(
                f"{self._attribute}[{name!r}] is a view and cannot be replaced; assign its weight or change it in place"
            )

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        """The class that HF PEFT's attribute has, for `isinstance`: nn.ModuleDict, nn.ParameterDict or dict."""
        element = next(iter(self.values()), None)
        if element is None:
            return nn.ParameterDict if "embedding" in self._attribute else nn.ModuleDict
        if isinstance(element, nn.Module):
            return nn.ModuleDict
        return nn.ParameterDict if isinstance(element, Tensor) else dict

    def __getattr__(self, name: str) -> Any:
        if "_attribute" not in vars(self):  # while a copy is made
            raise AttributeError(name)
        if name in self:  # as in nn.ModuleDict: lora_A.default
            return self[name]
        container: Any = self.__class__
        if hasattr(container, name):  # such as lora_A.parameters() and scaling.copy()
            return getattr(container(dict(self)), name)
        raise AttributeError(f"{self._attribute} has no adapter {name!r}; it has {list(self)}")

    def __delitem__(self, name: str) -> None:
        raise PeftError(f"{self._attribute}[{name!r}] is a view; delete the whole adapter by delete_adapter({name!r})")

    def __iter__(self) -> Iterator[str]:
        adapters = self._slot.adapters
        return (name for name in adapters if has_attribute(adapters[name], self._attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{self._attribute}: {dict(self)!r}"

    def __reduce__(self) -> Any:  # the default one would take `__class__` for the type
        return PerAdapter, (self._slot, self._attribute)


class _FrozenNames(Mapping[str, tuple[str, ...]]):
    """{adapter name: attributes whose parameters never train}, of the adapters of a slot that have such parameters."""

    def __init__(self, slot: AdapterSlot):
        self._slot = slot

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if name not in self._slot.adapters or not (part := self._slot.adapters[name]).frozen:
            raise KeyError(name)
        keys = part.checkpoint_keys()
        return tuple(keys[frozen].split(".")[0] for frozen in sorted(part.frozen))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._slot.adapters if self._slot.adapters[name].frozen)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def has_attribute(adapter: Adapter, attribute: str) -> bool:
    """Return True if HF PEFT's layer has this attribute for the adapter's method."""
    if _parameters(adapter, attribute) or _number(adapter, attribute) is not None:
        return True
    return adapter.shared is not None and shared_tensor(adapter.shared, attribute) is not None


def shared_tensor(shared: Shared, name: str) -> Tensor | None:
    """Return a tensor that all layers of an adapter share, such as VeRA's `vera_A`; None if it does not exist."""
    tensor = shared._parameters.get(name)
    return shared._buffers.get(name) if tensor is None else tensor


def parameter_attributes(adapter: Adapter) -> list[str]:
    """Return the attributes of HF PEFT's layer that hold the adapter's parameters, such as ["lora_A", "lora_B"]."""
    return list(dict.fromkeys(key.split(".")[0] for key in adapter.checkpoint_keys().values()))


def _parameters(adapter: Adapter, attribute: str) -> dict[str, str]:
    """Return {rest of the key on disk after the attribute: the parameter's name in the adapter}."""
    start = f"{attribute}."
    keys = adapter.checkpoint_keys().items()
    if not keys and attribute in adapter._parameters:  # shared with another layer, which saves the parameter
        return {"": attribute}
    return {key[len(start) :]: name for name, key in keys if key == attribute or key.startswith(start)}


def _number(adapter: Adapter, attribute: str) -> Any:
    if attribute in _NUMBERS.values():
        return None  # HF PEFT's layers have the number under its other name only
    value = getattr(adapter, attribute, getattr(adapter, _NUMBERS.get(attribute, attribute), None))
    config, path = adapter.printed
    is_shown_tensor = attribute in _COMPUTED or attribute.startswith(_prefix(adapter))  # unilora_indices_A
    is_shown_tensor = is_shown_tensor and not isinstance(value, nn.Parameter)
    if isinstance(value, int | float) or (isinstance(value, Tensor) and is_shown_tensor):
        return value if attribute != "scaling" or adapter.scaling_unit == 1 else value * adapter.scaling_unit
    if not hasattr(config, attribute):
        attribute = attribute.removeprefix(_prefix(adapter))  # waveft_n_frequency
    if not hasattr(config, attribute) or attribute.startswith("_"):
        return None
    value = options_at(config, path).get(attribute, getattr(config, attribute))
    return value if isinstance(value, int | float) or attribute == "token_indices" else None


def _is_dropout(adapter: Adapter, attribute: str) -> bool:
    option = adapter.dropout_option
    return bool(option) and attribute in (option, f"{_prefix(adapter)}{option}")  # such as supertuning_lora_dropout


def _take_tensors(shown: FactorView, module: nn.Module, what: str) -> None:
    """Give an adapter the parameters of a module that has the same ones; else raise ConfigError."""
    wanted = {name: tuple(getattr(shown, name).shape) for name in shown.names}
    given = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if given != wanted:
        raise ConfigError(
            f"{what} must be a module with the parameters {wanted}; got {type(module).__name__} with {given}"
        )
    for name, parameter in module.named_parameters():
        setattr(shown, name, parameter)


def _prefix(adapter: Adapter) -> str:
    """Return how the names of the method's tensors begin, such as "vera_"."""
    return f"{getattr(adapter.printed[0], 'peft_type', '').lower()}_"


def _element(adapter: Adapter, attribute: str) -> Any:
    parameters = _parameters(adapter, attribute)
    if attribute in IN_A_MODULE and "" in parameters:
        parameters = {"weight": parameters[""]}
    if parameters == {"": parameters.get("")}:
        return adapter.shown_parameter(parameters[""])
    if _is_dropout(adapter, attribute):
        return adapter.dropout_module or nn.Identity()
    if parameters:
        return factor_view(adapter, attribute, parameters)
    number = _number(adapter, attribute)
    return shared_tensor(adapter.shared, attribute) if number is None and adapter.shared is not None else number


def layer_type(slot: AdapterSlot) -> str:
    """Return the class that HF PEFT has for the layer and the method of its first adapter, such as "lora.Linear"."""
    parts = (slot.adapters[name] for name in slot.adapters)
    part = next((part for part in parts if not isinstance(part, TrainedBias)), None)
    if part is None:
        return type(slot).__name__
    if isinstance(part, method_named("TRAINABLE_TOKENS").adapter):
        return TOKENS_LAYER
    layer = type(slot.base.layer).__name__
    names = {"parameter": "ParamWrapper", "linear": "Linear"}
    kind = layer if slot.base.quantized else names.get(slot.base.kind, layer)
    return f"{part.printed[0].peft_type.lower()}.{kind}"


class PeftLayerAttributes(MergingMethods):
    """The attributes and methods of HF PEFT's `BaseTunerLayer`, for a wrapper with one slot of adapters."""

    @property
    def _slot(self) -> AdapterSlot:
        """The slot whose adapters the attributes show."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or (view := self.peft_attribute(name)) is None:
                raise
            return view

    def _get_name(self) -> str:
        """Return the name by which the layer is printed."""
        return layer_type(self._slot)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Attributes that hold the parameters of adapters, such as ("lora_A", "lora_B")."""
        names = (name for key in self._slot.adapters for name in parameter_attributes(self._slot.adapters[key]))
        return tuple(dict.fromkeys(names))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Attributes that hold numbers of adapters, such as ("r", "scaling", "lora_alpha")."""
        slot = self._slot
        configs = [slot.adapters[name].printed[0] for name in slot.adapters]
        options = (o.name for config in configs if dataclasses.is_dataclass(config) for o in dataclasses.fields(config))
        names = dict.fromkeys(("r", "scaling", *options))
        shown = set(names) - {"fan_in_fan_out", *self.adapter_layer_names}
        return tuple(name for name in names if name in shown and self.peft_attribute(name))

    @property
    def frozen_peft_weight_names(self) -> Mapping[str, tuple[str, ...]]:
        """{adapter: attributes whose parameters never train}, such as {"default": ("lora_B",)} for MiCA."""
        return _FrozenNames(self._slot)

    @property
    def in_features(self) -> int:
        """Size of the layer's input; channels of a convolution, rows of an embedding."""
        return self._slot.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the layer's output; channels of a convolution, columns of an embedding."""
        return self._slot.base.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """True if the weight is stored as (inputs, outputs), as in transformers' Conv1D."""
        return isinstance(self._slot.base, Conv1DWeight)

    @property
    def merged(self) -> bool:
        """True if adapters are merged into this layer's weight."""
        return bool(self._slot.merged_names)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into this layer's weight."""
        return list(self._slot.merged_names)

    @property
    def scaling(self) -> Any:
        """{adapter: scaling} of the adapters that have one; an assignment of such a dictionary sets each."""
        view = self.peft_attribute("scaling")
        if view is None:
            raise AttributeError("scaling")  # nn.Module then looks for the base layer's attribute
        return view

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        view = PerAdapter(self._slot, "scaling")
        for name, value in values.items():
            view[name] = value

    @property
    def is_feedforward(self) -> bool:
        """True if an adapter of IA3 scales this layer's input, False if it scales the output."""
        adapters = self._slot.adapters
        scales_input = [vars(adapters[name]).get("scales_input") for name in adapters]
        if all(value is None for value in scales_input):
            raise AttributeError("is_feedforward")  # nn.Module then looks for the base layer's attribute
        return any(scales_input)

    @property
    def token_adapter(self) -> "PeftLayerAttributes":
        """This layer itself if some of its rows are trained (`trainable_token_indices`).

        In HF PEFT this attribute is a second layer inside of this one.
        """
        if self.has_token_adapter:
            return self
        raise AttributeError("token_adapter")  # nn.Module then looks for the base layer's attribute

    @property
    def original_module(self) -> nn.Module:
        """The base layer, if some of its rows are trained (`trainable_token_indices`)."""
        if self.has_token_adapter:
            return self._slot.base.layer
        raise AttributeError("original_module")  # nn.Module then looks for the base layer's attribute

    @property
    def has_token_adapter(self) -> bool:
        """True if `trainable_token_indices` trains rows of this layer beside the adapter of another method."""
        slot = self._slot
        return any(slot.adapters[name].disk_prefix == "token_adapter." for name in slot.adapters)

    def get_base_layer(self) -> nn.Module:
        """Return the layer without adapters."""
        return self._slot.base.layer

    def get_base_weight(self) -> Tensor:
        """Return the weight of the layer without adapters, detached; a quantised weight is dequantised."""
        base = self._slot.base
        return base.oriented(base.read()).detach() if base.quantized else base.layer.get_parameter("weight").data

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W' − W of one adapter, in the orientation of the layer's weight.

        Args:
            adapter: the adapter's name.

        Raises:
            AdapterNameError: the layer has no such adapter.
            MergeError: the adapter cannot be expressed as a change of the weight.
        """
        if adapter not in self._slot.adapters:
            raise AdapterNameError(f"{self._slot.path} has no adapter {adapter!r}; it has {list(self._slot.adapters)}")
        part, base = self._slot.adapter(adapter), self._slot.base
        part.check_mergeable()
        if type(part).delta_weight is not Adapter.delta_weight or part.exact_factors() is not None:
            change = part.delta_weight()
        else:
            weight = base.read_unmerged()
            change = part.merged_weight(weight) - weight
        return base.oriented(change)

    def _all_available_adapter_names(self) -> list[str]:
        return list(self._slot.adapters)

    def _get_available_adapters(self) -> set[str]:
        return set(self._slot.adapters)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times its start value, lora_alpha / r for LoRA.

        An adapter that the layer does not have is no error, because an adapter may leave layers out.

        Args:
            adapter: the adapter's name.
            scale: the factor.
        """
        if adapter in self._slot.adapters:
            part = self._slot.adapters[adapter]
            part.scaling = scale * _start_scaling(part)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Give a LoRA of this layer new start values; an adapter that the layer does not have is no error.

        Args:
            adapter_name: the adapter's name.
            init_lora_weights: the initialisation, as the option of `LoraConfig`; False changes nothing, as in HF PEFT.

        Raises:
            PeftError: the adapter is no LoRA.
            ConfigError: there is no such initialisation.
        """
        if adapter_name not in self._slot.adapters or init_lora_weights is False:
            return
        part: Any = self._slot.adapter(adapter_name)
        config = part.printed[0]
        if getattr(config, "peft_type", "") != "LORA":
            raise PeftError(f"reset_lora_parameters: {adapter_name!r} is no LoRA; it is {type(part).__name__}")
        part.config = dataclasses.replace(config, init_lora_weights=init_lora_weights)
        try:
            part.reset_parameters()
        finally:
            part.config = config

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters.

        Args:
            scale: the factor.
        """
        for name in self.active_adapters:
            if name in self._slot.adapters and hasattr(part := self._slot.adapters[name], "scaling"):
                _start_scaling(part)
                part.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters.

        Args:
            scale: the divisor; None restores the start value, lora_alpha / r for LoRA.
        """
        for name in self.active_adapters:
            if name in self._slot.adapters and hasattr(part := self._slot.adapters[name], "scaling"):
                start = _start_scaling(part)
                part.scaling = start if scale is None else part.scaling / scale

    def peft_attribute(self, name: str) -> PerAdapter | None:
        """Return the view {adapter: element} of an attribute such as `lora_A`; None if no adapter here can have it."""
        slot = self._slot
        view = PerAdapter(slot, name)
        if len(view):
            return view
        is_lora = name in _OF_EACH_LORA_LAYER and any(
            getattr(slot.adapters[one].printed[0], "peft_type", "") == "LORA" for one in slot.adapters
        )
        return view if is_lora else None


def _start_scaling(adapter: Any) -> float:
    """Return the scaling from before the first change through a view; call this before each change."""
    return vars(adapter).setdefault("start_scaling", float(adapter.scaling))
