"""Putting prepared adapters into a model, and taking adapters away."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from peftcore import forwarding, fused_paths
from peftcore.adapter import Adapter
from peftcore.adapter_set import ATTRIBUTE, PROMPTS, AdapterSet, adapter_set, bias_path
from peftcore.bases import ParameterWeight
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError, MergeError
from peftcore.host import AdaptedLayer, AdaptedParameters, SavedModule, Site, modules_outside_hosts
from peftcore.preparation import Injection, prepare_injection
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of
from peftcore.replication import Replication, replicate


def commit_injection(
    model: nn.Module, injection: Injection, trainable: bool, replication: Replication | None = None
) -> AdapterSet:
    """Put a prepared adapter into the model; the first one freezes the base and becomes active."""
    if ATTRIBUTE not in model.__dict__:
        model.requires_grad_(False)
        model.__dict__[ATTRIBUTE] = AdapterSet()
        forwarding.install(model)
    adapters = adapter_set(model)
    places = _places(model)
    name = injection.name
    for path, adapter in injection.adapters.items():
        site = _site_at(model, path, adapter, adapters, places)
        site.adapters[name] = adapter.requires_grad_(trainable).train(site.training)
        if adapter.new_base is not None:
            site.replace_base(adapter.new_base)
            adapter.new_base = None
        adapters.layers[path] = site
    for path, module in injection.copies.items():
        host = _host_at(model, path, SavedModule, adapters, places)
        host.copies[name] = module.requires_grad_(trainable).train(host.training)
        adapters.saved[path] = host
    adapters.configs[name] = injection.config
    adapters.kinds[name] = method_of(injection.config).adapter
    taken = adapters.kinds[name].forward_arguments(injection.config)
    if taken is not None:
        adapters.listening[name] = taken
    if injection.prompt is not None:
        _put_prompt(model, adapters, name, injection.prompt.requires_grad_(trainable).train(model.training))
    if replication is not None:
        adapters.replication = (name, replication)
    if injection.biases:
        biases = {path: model.get_parameter(bias_path(adapters, path)) for path in injection.biases}
        adapters.own_biases[name] = {path: bias.detach().clone() for path, bias in biases.items()}
        for bias in biases.values():
            bias.requires_grad_(trainable)
    if not adapters.selection.active:
        adapters.selection.active = (name,)
    return adapters


def _put_prompt(model: nn.Module, adapters: AdapterSet, name: str, prompt: PromptLearner) -> None:
    if not len(adapters.prompts):
        model.add_module(PROMPTS, adapters.prompts)
        forwarding.install_prompts(model, adapters)
    adapters.prompts[name] = prompt
    prompt.attach(model, partial(adapters.selection.acts, name))


def _take_prompt(model: nn.Module, adapters: AdapterSet, name: str) -> None:
    adapters.prompts[name].detach(model)
    del adapters.prompts[name]
    if not len(adapters.prompts):
        del model._modules[PROMPTS]
        forwarding.remove_prompts(model)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """{id of a module: every path where it stands}; one walk for any number of replacements."""
    places: dict[int, list[str]] = {}
    for path, module in modules_outside_hosts(model):
        places.setdefault(id(module), []).append(path)
    return places


def _site_at(model: nn.Module, path: str, adapter: Adapter, adapters: AdapterSet, places: dict[int, list[str]]) -> Site:
    if isinstance(adapter.base, ParameterWeight):
        owner = path.removesuffix(f".{adapter.base.name}")
        return _host_at(model, owner, AdaptedParameters, adapters, places).site(adapter.base.name)
    return _host_at(model, path, AdaptedLayer, adapters, places)


def _host_at(model: nn.Module, path: str, kind: type[Any], adapters: AdapterSet, places: dict[int, list[str]]) -> Any:
    """The host at `path`, made if need be and put at every path where the same module stands."""
    present = model.get_submodule(path)
    if isinstance(present, kind):
        return present
    host = kind(present, adapters.selection)
    for place in places[id(present)]:
        replace_module(model, place, host)
    fused_paths.switch_off(model, path)
    return host


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def inject_adapter_in_model(config: PeftConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put adapters into any `nn.Module` and give it back, with its class unchanged.

    The base is frozen. On an error the model is as it was.
    """
    with deepened(model, config) as replication:
        injection = prepare_injection(model, config, adapter_name)
        commit_injection(model, injection, not config.inference_mode, replication)
    return model


@contextlib.contextmanager
def deepened(model: nn.Module, config: PeftConfig) -> Iterator[Replication | None]:
    """The model with `layer_replication` done, if the configuration asks for it; an error inside undoes it."""
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        yield None
        return
    if ATTRIBUTE in model.__dict__:
        raise ConfigError("layer_replication changes the model's depth; add that adapter first, to a plain model")
    replication = replicate(model, ranges)
    try:
        yield replication
    except BaseException:
        replication.undo()
        raise


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; hosts that keep none become the plain layer again, trained biases go back."""
    adapters = adapter_set(model)
    adapters.require(name)
    if any(name in host.merged for host in adapters.layers.values()):
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    deepens = adapters.replication is not None and adapters.replication[0] == name
    if deepens and len(adapters.configs) > 1:
        raise ConfigError(f"adapter {name!r} made the model deeper (layer_replication); delete the others first")
    _restore_biases(model, adapters, name)
    if name in adapters.prompts:
        _take_prompt(model, adapters, name)
    places = _places(model)
    for path, site in list(adapters.layers.items()):
        if name in site.adapters:
            del site.adapters[name]
            if not len(site.adapters):
                site.restore_base()
                del adapters.layers[path]
    for host in _empty_hosts(model):
        _put_back(model, places[id(host)], host.base_layer)
    for path, saved in list(adapters.saved.items()):
        if name in saved.copies:
            del saved.copies[name]
            if not len(saved.copies):
                _put_back(model, places[id(saved)], saved.base_layer)
                del adapters.saved[path]
    fused_paths.switch_on(model)
    del adapters.configs[name]
    del adapters.kinds[name]
    adapters.listening.pop(name, None)
    if deepens and adapters.replication is not None:
        adapters.replication[1].undo()
        adapters.replication = None
    adapters.selection.active = tuple(n for n in adapters.selection.active if n != name)


def _empty_hosts(model: nn.Module) -> list[AdaptedLayer | AdaptedParameters]:
    hosts = [module for _, module in modules_outside_hosts(model)]
    return [host for host in hosts if isinstance(host, AdaptedLayer | AdaptedParameters) and host.is_empty()]


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
    for name in list(adapters.prompts):
        _take_prompt(model, adapters, name)
    places = _places(model)
    for site in adapters.layers.values():
        if not keep_trained:
            site.restore_base()
        site.adapters._modules.clear()
    for host in _empty_hosts(model):
        _put_back(model, places.get(id(host), []), host.base_layer)
    for host in adapters.saved.values():
        _put_back(model, places.get(id(host), []), host.current() if keep_trained else host.base_layer)
    adapters.layers.clear()
    fused_paths.switch_on(model)
    for name in list(adapters.own_biases):
        if keep_trained and name in adapters.selection.active:
            del adapters.own_biases[name]
        else:
            _restore_biases(model, adapters, name)
    if adapters.replication is not None and not keep_trained:
        adapters.replication[1].undo()
    model.requires_grad_(False)
    del model.__dict__[ATTRIBUTE]
    forwarding.remove(model)
