"""Adding adapters to a model and taking them away: everything is made and checked first, then put in place."""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from peftcore import forwarding
from peftcore.adapter import Adapter, Shared
from peftcore.adapter_set import ATTRIBUTE, AdapterSet, adapter_set, bias_path
from peftcore.bases import BaseWeight, base_weight
from peftcore.config import PeftConfig, TunerConfig
from peftcore.errors import AdapterNameError, ConfigError, MergeError, TargetError
from peftcore.host import AdaptedLayer, SavedModule, modules_outside_hosts
from peftcore.registry import method_of
from peftcore.targets import completed, find_saved_modules, find_targets


@dataclasses.dataclass
class Injection:
    """An adapter that is made and checked but not in the model yet."""

    name: str
    config: TunerConfig
    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]
    biases: list[str]


def prepare_injection(model: nn.Module, config: PeftConfig, name: str) -> Injection:
    """Make an adapter's modules without touching the model.

    Raises AdapterNameError, ConfigError, TargetError for a name, an option or targets that cannot be.
    """
    method = method_of(config)
    if not isinstance(config, TunerConfig):
        raise ConfigError(f"{type(config).__name__} does not adapt layers; use one of the tuner configurations")
    _check_name(model, name)
    _check_not_compiled(model)
    config = completed(model, config)
    _check_single_bias(model, config)
    targets = find_targets(model, config)
    saved = find_saved_modules(model, config)
    bases = {path: _base_of(method.adapter, config, layer, path) for path, layer in targets.items()}
    adapters = _make_adapters(method.adapter, config, bases)
    copies = {path: _copy_of(module) for path, module in saved.items()}
    return Injection(name, config, adapters, copies, _own_biases(model, config, list(targets)))


def _base_of(kind: type[Adapter], config: TunerConfig, layer: nn.Module, path: str) -> BaseWeight:
    base = base_weight(layer.base_layer if isinstance(layer, AdaptedLayer) else layer, path)
    if base.kind not in kind.layer_kinds:
        fits = ", ".join(sorted(kind.layer_kinds))
        raise TargetError(f"{config.peft_type} does not adapt {base.kind} layers such as {path}; it adapts {fits}")
    return base


def _make_adapters(kind: type[Adapter], config: TunerConfig, bases: dict[str, BaseWeight]) -> dict[str, Adapter]:
    first = next(iter(bases.values()))
    with torch.device(first.device):
        shared = kind.make_shared(config, bases)
        if shared is not None:
            shared.to(torch.promote_types(first.dtype, torch.float32))
    return {path: _make(kind, config, base, path, shared) for path, base in bases.items()}


def _make(kind: type[Adapter], config: TunerConfig, base: BaseWeight, path: str, shared: Shared | None) -> Adapter:
    with torch.device(base.device):
        adapter = kind(config, base, path)
        adapter.to(torch.promote_types(base.dtype, torch.float32))
        if shared is not None:
            adapter.shared = shared
        adapter.reset_parameters()
    return adapter


def _copy_of(module: nn.Module) -> nn.Module:
    original = module.base_layer if isinstance(module, SavedModule) else module
    return copy.deepcopy(original).requires_grad_(True)


def _check_name(model: nn.Module, name: str) -> None:
    if not name or not isinstance(name, str) or "." in name or "/" in name:
        raise AdapterNameError(f"an adapter's name is a word without '.' or '/'; got {name!r}")
    if ATTRIBUTE in model.__dict__ and name in adapter_set(model).configs:
        raise AdapterNameError(f"there is already an adapter named {name!r}; delete it first or take another name")


def _check_not_compiled(model: nn.Module) -> None:
    classes = {c.__name__ for c in type(model).__mro__}
    for wrapper, call in (("OptimizedModule", "torch.compile"), ("FSDPModule", "fully_shard")):
        if wrapper in classes:
            raise ConfigError(f"adapters must be attached before {call}; attach first, then call {call}")


def _check_single_bias(model: nn.Module, config: TunerConfig) -> None:
    others = adapter_set(model).own_biases if ATTRIBUTE in model.__dict__ else {}
    if getattr(config, "bias", "none") != "none" and others:
        raise ConfigError(
            f"bias={config.bias!r}: the model's biases already belong to adapter {next(iter(others))!r}; "  # type: ignore[attr-defined]
            "at most one adapter can train them; use bias='none'"
        )


def _own_biases(model: nn.Module, config: TunerConfig, targets: list[str]) -> list[str]:
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return []
    inside = {path: _unhosted(module) for path, module in modules_outside_hosts(model)}
    paths = targets if mode == "lora_only" else inside
    return [f"{path}.bias" for path in paths if isinstance(inside[path]._parameters.get("bias"), nn.Parameter)]


def _unhosted(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdaptedLayer | SavedModule) else module


def commit_injection(model: nn.Module, injection: Injection, trainable: bool) -> AdapterSet:
    """Put a prepared adapter into the model; the first one freezes the base and becomes active."""
    if ATTRIBUTE not in model.__dict__:
        model.requires_grad_(False)
        model.__dict__[ATTRIBUTE] = AdapterSet()
        forwarding.install(model)
    adapters = adapter_set(model)
    places = _places(model)
    name = injection.name
    for path, adapter in injection.adapters.items():
        host = _host_at(model, path, AdaptedLayer, adapters, places)
        host.adapters[name] = adapter.requires_grad_(trainable).train(host.training)
        adapters.layers[path] = host
    for path, module in injection.copies.items():
        host = _host_at(model, path, SavedModule, adapters, places)
        host.copies[name] = module.requires_grad_(trainable).train(host.training)
        adapters.saved[path] = host
    adapters.configs[name] = injection.config
    if injection.biases:
        biases = {path: model.get_parameter(bias_path(adapters, path)) for path in injection.biases}
        adapters.own_biases[name] = {path: bias.detach().clone() for path, bias in biases.items()}
        for bias in biases.values():
            bias.requires_grad_(trainable)
    if not adapters.selection.active:
        adapters.selection.active = (name,)
    return adapters


def _places(model: nn.Module) -> dict[int, list[str]]:
    """{id of a module: every path where it stands}; one walk for any number of replacements."""
    places: dict[int, list[str]] = {}
    for path, module in modules_outside_hosts(model):
        places.setdefault(id(module), []).append(path)
    return places


def _host_at(model: nn.Module, path: str, kind: type[Any], adapters: AdapterSet, places: dict[int, list[str]]) -> Any:
    """The host at `path`, made if need be and put at every path where the same module stands."""
    present = model.get_submodule(path)
    if isinstance(present, kind):
        return present
    host = kind(present, adapters.selection)
    for place in places[id(present)]:
        replace_module(model, place, host)
    if isinstance(parent := model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # its fused eval path reads the weights and would pass the adapter by
    return host


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def inject_adapter_in_model(config: PeftConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put adapters into any `nn.Module` and give it back, with its class unchanged.

    The base is frozen. On an error the model is as it was.
    """
    commit_injection(model, prepare_injection(model, config, adapter_name), trainable=not config.inference_mode)
    return model


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; hosts that keep none become the plain layer again, trained biases go back."""
    adapters = adapter_set(model)
    adapters.require(name)
    if any(name in host.merged for host in adapters.layers.values()):
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    _restore_biases(model, adapters, name)
    places = _places(model)
    for path, host in list(adapters.layers.items()):
        if name in host.adapters:
            del host.adapters[name]
            if not len(host.adapters):
                _put_back(model, places[id(host)], host.base_layer)
                del adapters.layers[path]
    for path, saved in list(adapters.saved.items()):
        if name in saved.copies:
            del saved.copies[name]
            if not len(saved.copies):
                _put_back(model, places[id(saved)], saved.base_layer)
                del adapters.saved[path]
    del adapters.configs[name]
    adapters.selection.active = tuple(n for n in adapters.selection.active if n != name)


def _restore_biases(model: nn.Module, adapters: AdapterSet, name: str) -> None:
    for path, value in adapters.own_biases.pop(name, {}).items():
        bias = model.get_parameter(bias_path(adapters, path))
        with torch.no_grad():
            bias.requires_grad_(False).copy_(value)


def _put_back(model: nn.Module, places: list[str], module: nn.Module) -> None:
    for place in places:
        replace_module(model, place, module)


def remove_hosts(model: nn.Module, keep_trained: bool) -> None:
    """Take every host out; keep_trained leaves the active adapters' whole modules and biases in place."""
    adapters = adapter_set(model)
    places = _places(model)
    for host in adapters.layers.values():
        _put_back(model, places.get(id(host), []), host.base_layer)
    for host in adapters.saved.values():
        _put_back(model, places.get(id(host), []), host.current() if keep_trained else host.base_layer)
    adapters.layers.clear()
    for name in list(adapters.own_biases):
        if keep_trained and name in adapters.selection.active:
            del adapters.own_biases[name]
        else:
            _restore_biases(model, adapters, name)
    model.requires_grad_(False)
    del model.__dict__[ATTRIBUTE]
    forwarding.remove(model)
