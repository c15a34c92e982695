"""Adding adapters to a model and taking them away: everything is made and checked first, then put in place."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from peftcore import forwarding, fused_paths
from peftcore.adapter import Adapter, Shared
from peftcore.adapter_set import ATTRIBUTE, PROMPTS, AdapterSet, adapter_set, bias_path
from peftcore.bases import BaseWeight, ParameterWeight, base_weight, raw_projections
from peftcore.config import PeftConfig, PromptLearningConfig, TunerConfig
from peftcore.errors import AdapterNameError, ConfigError, MergeError, TargetError
from peftcore.host import AdaptedLayer, AdaptedParameters, SavedModule, Site, modules_outside_hosts
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_named, method_of
from peftcore.replication import Replication, replicate
from peftcore.targets import completed, find_parameters, find_saved_modules, find_targets, tied_paths, with_heads


@dataclasses.dataclass
class Injection:
    """An adapter that is made and checked but not in the model yet."""

    name: str
    config: PeftConfig
    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]
    biases: list[str]
    prompt: PromptLearner | None = None


def prepare_injection(model: nn.Module, config: PeftConfig, name: str, fresh: bool = True) -> Injection:
    """Make an adapter's modules without touching the model.

    fresh: False spares a prompt its start, which may need a tokenizer; the caller reads it from disk.
    Raises AdapterNameError, ConfigError, TargetError for a name, an option or targets that cannot be.
    """
    if issubclass(kind := method_of(config).adapter, PromptLearner):
        return _prepare_prompt(model, kind, config, name, fresh)
    if not isinstance(config, TunerConfig):
        raise ConfigError(f"{type(config).__name__} does not adapt layers; use one of the tuner configurations")
    _check_name(model, name)
    _check_not_compiled(model)
    config = completed(model, config)
    _check_single_bias(model, config)
    saved = find_saved_modules(model, config)
    adapters = _adapters_for(model, config)
    adapters |= _token_adapters(model, config, adapters)
    targets = [path for path, adapter in adapters.items() if adapter.base.kind != "parameter"]
    copies = _copies_of(model, config, saved)
    return Injection(name, config, adapters, copies, _own_biases(model, config, targets))


def _prepare_prompt(
    model: nn.Module, kind: type[PromptLearner], config: PeftConfig, name: str, fresh: bool
) -> Injection:
    _check_name(model, name)
    _check_not_compiled(model)
    config, copies = kind.completed(config, model), {}
    if isinstance(config, PromptLearningConfig):
        config = with_heads(model, config)
        copies = {path: _copy_of(module) for path, module in find_saved_modules(model, config).items()}
    weight = next(model.parameters())
    with torch.device(weight.device):
        prompt = kind(config, model)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    prompt.to(wide)
    if fresh:
        prompt.reset_parameters(model)
    return Injection(name, config, {}, copies, [], prompt)


def _adapters_for(model: nn.Module, config: TunerConfig) -> dict[str, Adapter]:
    """{path: adapter} for the targets of a configuration, made and set to their start."""
    kind = method_of(config).adapter
    targets = find_targets(model, config)
    if kind.follows_ties or getattr(config, "ensure_weight_tying", False):
        targets |= {path: model.get_submodule(path) for path in tied_paths(model, targets)}
    bases: dict[str, BaseWeight] = {}
    for path, layer in targets.items():
        for base in _bases_of(kind, config, layer, path):
            bases[f"{path}.{base.name}" if isinstance(base, ParameterWeight) else path] = base
    bases |= _parameter_bases(model, config)
    adapters = _make_adapters(kind, config, bases)
    kind.link(config, adapters)
    owners = [path.rpartition(".")[0] for path, base in bases.items() if base.kind == "parameter"]
    for path, adapter in adapters.items():
        if adapter.base.kind == "parameter":  # PEFT wraps a module once for each of its parameters, the last outermost
            owners.remove(path.rpartition(".")[0])
            adapter.disk_prefix = "base_layer." * owners.count(path.rpartition(".")[0])
    return adapters


def _parameter_bases(model: nn.Module, config: TunerConfig) -> dict[str, BaseWeight]:
    found = find_parameters(model, config)
    return {path: ParameterWeight(module, name) for path, (module, name) in found.items()}


def _token_adapters(model: nn.Module, config: TunerConfig, taken: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters of single embedding rows, for methods whose configuration has `trainable_token_indices`."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    made: dict[str, Adapter] = {}
    for target, tokens in wanted.items() if isinstance(wanted, dict) else [(None, wanted)]:
        options: dict[str, Any] = {"token_indices": list(tokens), "target_modules": target and [target]}
        made |= _adapters_for(model, cast(TunerConfig, method_named("TRAINABLE_TOKENS").config(**options)))
    if both := sorted(made.keys() & taken.keys()):
        raise ConfigError(f"trainable_token_indices: {both[0]} is a target itself; leave it out of one of the two")
    for adapter in made.values():
        adapter.disk_prefix = "token_adapter."
    return made


def _bases_of(kind: type[Adapter], config: TunerConfig, layer: nn.Module, path: str) -> list[BaseWeight]:
    """The weights that one target is adapted at: one, or the two projections of an nn.MultiheadAttention."""
    layer = _unhosted(layer)
    bases: list[BaseWeight] = [ParameterWeight(layer, name) for name in raw_projections(layer)]
    bases = bases or [base_weight(layer, path)]
    if bases[0].kind not in kind.layer_kinds:
        word = type(layer).__name__ if isinstance(layer, nn.MultiheadAttention) else bases[0].kind
        fits = ", ".join(sorted(kind.layer_kinds))
        raise TargetError(f"{config.peft_type} does not adapt {word} layers such as {path}; it adapts {fits}")
    return bases


def _make_adapters(kind: type[Adapter], config: TunerConfig, bases: dict[str, BaseWeight]) -> dict[str, Adapter]:
    first = next(iter(bases.values()), None)
    if first is None:
        return {}
    with torch.device(first.device):
        shared = kind.make_shared(config, bases)
        if shared is not None:
            shared.to(torch.promote_types(first.dtype, torch.float32))
    return {path: _make(kind, config, base, path, shared) for path, base in bases.items()}


def _make(kind: type[Adapter], config: TunerConfig, base: BaseWeight, path: str, shared: Shared | None) -> Adapter:
    if isinstance(base, ParameterWeight) and raw_projections(base.layer):
        path = path.removesuffix(f".{base.name}")  # patterns name the module that is the target
    with torch.device(base.device):
        adapter = kind(config, base, path)
        adapter.to(torch.promote_types(base.dtype, torch.float32))
        if shared is not None:
            adapter.shared = shared
        adapter.reset_parameters()
    return adapter


def _copies_of(model: nn.Module, config: TunerConfig, saved: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Trainable copies; with `ensure_weight_tying`, of both sides of a tied pair, and these share their weight too."""
    copies = {path: _copy_of(module) for path, module in saved.items()}
    if getattr(config, "ensure_weight_tying", False):
        for path, other in tied_paths(model, saved).items():
            copies[path] = _copy_of(model.get_submodule(path))
            copies[path].weight = copies[other].weight
    return copies


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
    paths = targets if mode.endswith("_only") else inside
    return [f"{path}.bias" for path in paths if isinstance(inside[path]._parameters.get("bias"), nn.Parameter)]


def _unhosted(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdaptedLayer | AdaptedParameters | SavedModule) else module


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
