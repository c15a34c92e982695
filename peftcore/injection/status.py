"""Status of the adapters of each layer and of a whole model: `get_layer_status` and `get_model_status`."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from peftcore._util.both_libraries import refuse_layers_of_hf_peft
from peftcore.config import PeftConfig
from peftcore.errors import NoLayersError, TargetError
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.tuner_model import TunerModel
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.peft_attributes import TOKENS_LAYER, layer_type
from peftcore.layers.trained_bias import TrainedBias

Irregular = Literal["irregular"]
"""The value of a field that differs between layers."""


@dataclass
class TunerLayerStatus:
    """The adapters of one layer.

    Attributes:
        name: the layer's path, below `base_model` for a `PeftModel`: "model.encoder.0", as in HF PEFT.
        module_type: the class of the layer in HF PEFT, such as "lora.Linear".
        enabled: False after `disable_adapters`.
        active_adapters: names of the active adapters, in order.
        merged_adapters: names of the adapters that are merged into the layer's weight.
        requires_grad: {adapter: whether its parameters train; "irregular" if only some do}.
        available_adapters: names of the layer's adapters, sorted.
        devices: {adapter: types of the devices of its parameters, sorted}.
        quantization_backend: the storage of a quantised weight, such as "bnb 4bit"; None for a plain weight.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a model; a field is "irregular" if it differs between layers.

    Attributes:
        base_model_type: the class of the base model; "other" if it is neither a `PeftModel` nor transformers' model.
        adapter_model_type: the class of HF PEFT's model for the method, such as "LoraModel"; "None" if the model is no
            `PeftModel`.
        peft_types: {adapter: method}; {} if the model is no `PeftModel`.
        trainable_params: number of parameters that train.
        total_params: number of all parameters.
        num_adapter_layers: number of layers with adapters.
        enabled: False after `disable_adapters`.
        active_adapters: names of the active adapters, in order.
        merged_adapters: names of the merged adapters.
        requires_grad: {adapter: whether its parameters train}.
        available_adapters: names of all adapters, sorted.
        devices: {adapter: types of the devices of its parameters, sorted}.
        quantization_backend: see `TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each layer with adapters, in the order of the model's modules.

    Args:
        model: a model with adapters, or a module that holds some, such as a SentenceTransformer.

    Raises:
        TargetError: no layer of the model has an adapter.
        NoLayersError: the model's adapters are prompts; as in HF PEFT, a TypeError.
    """
    statuses = [(path, part, _statuses(part)) for path, part in _parts_with_adapters(model)]
    if not any(of_part for _, _, of_part in statuses):
        refuse_layers_of_hf_peft(model.modules())
        if names := [name for _, part, _ in statuses for name in adapter_set(part).prompts]:
            raise NoLayersError(f"{names} are prompts, which change no layer, so no layer has a status")
        raise TargetError("No adapter layers found in the model; add an adapter of layers by get_peft_model first")
    found = []
    for path, part, of_part in statuses:
        start = "base_model.model." if _is_peft_model(part) else ""
        start = start.removeprefix("base_model.") if part is model else f"{path}.{start}"
        found += [dataclasses.replace(status, name=f"{start}{status.name}") for status in of_part]
    return found


def _is_peft_model(model: nn.Module) -> bool:
    return isinstance(getattr(model, "base_model", None), TunerModel)


def _parts_with_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return [(path, model)] of the model itself if it has adapters, else of the models with adapters inside of it."""
    if ATTRIBUTE in model.__dict__:
        return [("", model)]
    return [(path, part) for path, part in model.named_modules() if ATTRIBUTE in part.__dict__]


def _statuses(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each layer of a model with adapters; [] if the adapters are prompts."""
    adapters = adapter_set(model)
    layers = {path: _layer_status(slot) for path, slot in adapters.layers.items()}
    copies = {
        path: _with_own_active(_status(wrapper.selection, path, "ModulesToSaveWrapper", wrapper.copies, (), None))
        for path, wrapper in adapters.saved.items()
    }
    position = {path: number for number, path in enumerate(ModuleIndex(model).modules)}
    statuses = {path: status for path, status in (layers | copies).items() if status is not None}
    ordered = sorted(statuses, key=lambda path: position.get(path, position.get(path.rpartition(".")[0], -1)))
    return [statuses[path] for path in ordered]


def _layer_status(slot: AdapterSlot) -> TunerLayerStatus | None:
    """Return the status of one slot; None if only the layer's bias trains."""
    parts = {name: slot.adapters[name] for name in slot.adapters if not isinstance(slot.adapters[name], TrainedBias)}
    if not parts:
        return None
    first = next(iter(parts))
    part, path = parts[first], slot.path
    if slot.base.kind == "parameter":
        path = path.rpartition(".")[0]
    path = f"{path}.{part.disk_prefix}".removesuffix(".")
    kind = layer_type(slot)
    status = _status(slot.selection, path, kind, parts, slot.merged_names, _backend(slot.base))
    return _with_own_active(status) if kind == TOKENS_LAYER else status


def _with_own_active(status: TunerLayerStatus) -> TunerLayerStatus:
    """Return a status with those active adapters that the layer has: as in HF PEFT, for parts that train in full."""
    active = [name for name in status.active_adapters if name in status.available_adapters]
    return dataclasses.replace(status, active_adapters=active)


def _status(
    selection: Any, path: str, kind: str, parts: Any, merged: tuple[str, ...], backend: str | None
) -> TunerLayerStatus:
    parameters = {name: list(parts[name].parameters()) for name in parts}
    return TunerLayerStatus(
        name=path,
        module_type=kind,
        enabled=not selection.switched_off,
        active_adapters=list(selection.active),
        merged_adapters=list(merged),
        requires_grad={
            name: _same({parameter.requires_grad for parameter in of_one}, default=False)
            for name, of_one in parameters.items()
        },
        available_adapters=sorted(parts),
        devices={name: sorted({p.device.type for p in of_one}) for name, of_one in parameters.items()},
        quantization_backend=backend,
    )


def _backend(base: Any) -> str | None:
    if not base.quantized:
        return None
    return base.backend or type(base.layer).__name__


def _same(values: Collection[Any], default: Any) -> Any:
    """Return the common value; "irregular" if there are several, `default` if there is none."""
    distinct = set(values)
    return "irregular" if len(distinct) > 1 else next(iter(distinct), default)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of all layers with adapters together.

    Args:
        model: a model with adapters, or a module that holds some, such as a SentenceTransformer.

    Raises:
        TargetError: no layer of the model has an adapter.
        NoLayersError: the model's adapters are prompts; as in HF PEFT, a TypeError.
    """
    layers = get_layer_status(model)
    owners = [adapter_set(part) for _, part in _parts_with_adapters(model)]
    has_tuner = _is_peft_model(model)
    configs = adapter_set(model).configs if has_tuner else {}
    wrappers = [one for adapters in owners for one in (*adapters.layers.values(), *adapters.saved.values())]
    active = _same({wrapper.selection.active for wrapper in wrappers}, default=())
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    is_partly_merged = any(
        name in layer.available_adapters and name not in layer.merged_adapters for layer in layers for name in merged
    )
    trainable, total = _parameter_counts(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(model).__name__ if has_tuner or isinstance(model, PreTrainedModel) else "other",
        adapter_model_type=_tuner_name(list(configs.values())) if has_tuner else "None",
        peft_types={name: config.method for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same({layer.enabled for layer in layers}, default=True),
        active_adapters=active if active == "irregular" else list(active),
        merged_adapters="irregular" if is_partly_merged else merged,
        requires_grad={
            name: _same({layer.requires_grad[name] for layer in layers if name in layer.requires_grad}, default=False)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in names
        },
        quantization_backend=_same({layer.quantization_backend for layer in layers}, default=None),
    )


def _parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all weights, as a `PeftModel` counts them."""
    counts: Any = getattr(model, "get_nb_trainable_parameters", None)
    if counts is not None:
        return counts()
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _tuner_name(configs: list[PeftConfig]) -> str:
    """Return the name of HF PEFT's class for adapters with these configurations."""
    if len({config.peft_type for config in configs}) > 1:
        return "MixedModel"
    return f"{type(configs[0]).__name__.removesuffix('Config')}Model"
