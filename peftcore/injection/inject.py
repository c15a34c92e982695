"""Putting prepared adapters into a model, and taking adapters away."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from peftcore.adapter import Adapter
from peftcore.bases import ParameterWeight
from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError, ConfigError, MergeError
from peftcore.injection import forward_hooks as forwarding
from peftcore.injection import torch_encoders as fused_paths
from peftcore.injection.adapter_set import ATTRIBUTE, PROMPTS, AdapterSet, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import Injection, prepare_injection
from peftcore.injection.replication import Replication, replicate
from peftcore.injection.shared_inputs import link_shared_inputs
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.adapter_parameters import AdapterParameters
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.wrapper import unwrapped
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of


def commit_injection(
    model: nn.Module, injection: Injection, trainable: bool, replication: Replication | None = None
) -> AdapterSet:
    """Put a prepared adapter into the model; the first one freezes the base. Which adapters act stays as it is."""
    if ATTRIBUTE not in model.__dict__:
        injection.module_index.freeze()
        model.__dict__[ATTRIBUTE] = AdapterSet()
        forwarding.install(model)
    adapters, module_index = adapter_set(model), injection.module_index
    name = injection.name
    parts = _with_biases(injection)
    wrapped = [p for p, a in parts.items() if a.base.kind == "linear" and p not in adapters.layers]
    for path, adapter in parts.items():
        site = _site_at(path, adapter, adapters, module_index)
        if trainable:
            site.training = True  # as with PEFT, its dropout acts at once, also on a base in evaluation mode
        elif adapter.training != site.training:
            adapter.train(site.training)
        _set_trainable(adapter, trainable)
        site.adapters[name] = adapter
        site.has_trained_biases |= path in injection.biases
        if adapter.new_base is not None:
            site.replace_base(adapter.new_base, name)
            adapter.new_base = None
        adapters.layers[path] = site
    for path, module in injection.copies.items():
        wrapper = _wrapper_at(path, SavedModule, adapters, module_index)
        wrapper.copies[name] = module.requires_grad_(trainable).train(wrapper.training)
        adapters.saved[path] = wrapper
    fused_paths.switch(module_index)
    for parent in {module_index.parent(path) for path in wrapped}:
        link_shared_inputs(parent)
    adapters.configs[name] = injection.config
    adapters.kinds[name] = method_of(injection.config).adapter
    taken = adapters.kinds[name].forward_arguments(injection.config)
    if taken is not None:  # a new dictionary, because a forward in another thread may be going through the old one
        adapters.listening = {**adapters.listening, name: taken}
    if injection.prompt is not None:
        _put_prompt(
            model, adapters, name, injection.prompt.requires_grad_(trainable).train(trainable or model.training)
        )
    if replication is not None:
        adapters.replication = (name, replication)
    return adapters


def _with_biases(injection: Injection) -> dict[str, Adapter]:
    """{path: adapter} with each trained bias in the adapter of its layer, or alone where there is none."""
    parts = dict(injection.adapters)
    for path, bias in injection.biases.items():
        if path in parts:
            parts[path].trained_bias = bias
        else:
            parts[path] = bias
    return parts


def _set_trainable(adapter: Adapter, trainable: bool) -> None:
    """`adapter.requires_grad_(trainable)`, which costs more than to set what is the adapter's own."""
    if adapter._modules:
        adapter.requires_grad_(trainable)
    for parameter in adapter._parameters.values():
        if parameter is not None:
            parameter.requires_grad = trainable


def _put_prompt(model: nn.Module, adapters: AdapterSet, name: str, prompt: PromptLearner) -> None:
    if not len(adapters.prompts):
        model.add_module(PROMPTS, adapters.prompts)
        forwarding.install_prompts(model, adapters)
    adapters.prompts[name] = prompt
    prompt.attach(model, partial(adapters.selection.share, name))


def _take_prompt(model: nn.Module, adapters: AdapterSet, name: str) -> None:
    adapters.prompts[name].detach(model)
    del adapters.prompts[name]
    if not len(adapters.prompts):
        del model._modules[PROMPTS]
        forwarding.remove_prompts(model)


def _site_at(path: str, adapter: Adapter, adapters: AdapterSet, module_index: ModuleIndex) -> AdapterSlot:
    if isinstance(adapter.base, ParameterWeight):
        owner = path.removesuffix(f".{adapter.base.name}")
        return _wrapper_at(owner, AdapterParameters, adapters, module_index).site(adapter.base)
    wrapper: AdapterLayer = _wrapper_at(path, AdapterLayer, adapters, module_index)
    wrapper.take_view(adapter.base)
    return wrapper


def _wrapper_at(path: str, kind: type[Any], adapters: AdapterSet, module_index: ModuleIndex) -> Any:
    """The wrapper at `path`, made if need be and put at every path where the same module stands."""
    present = module_index.modules[path]
    if isinstance(present, kind):
        return present
    wrapper = kind(present, adapters.selection)
    wrapper.path = path
    module_index.replace(present, wrapper)
    return wrapper


def inject_adapter_in_model(config: PeftConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put adapters into any `nn.Module`, make them the active ones, and give it back, with its class unchanged.

    The base is frozen. An adapter that has this name is replaced, with a warning, as in HF PEFT. On an error the model
    is as it was.
    """
    if ATTRIBUTE in model.__dict__ and adapter_name in adapter_set(model).configs:
        with deepened(model, config):
            prepare_injection(model, config, f"another {adapter_name}")  # errors come before anything is taken away
        delete_adapter(model, adapter_name)
        warnings.warn(
            f"adapter {adapter_name!r} was in the model already and is replaced by an untrained one; to keep both, "
            "give the new one another adapter_name",
            stacklevel=2,
        )
    add_adapter(model, config, adapter_name).selection.active = (adapter_name,)
    return model


def add_adapter(model: nn.Module, config: PeftConfig, name: str) -> AdapterSet:
    """Put an untrained adapter into the model; it acts once it is made active. On an error the model is as it was."""
    with deepened(model, config) as replication:
        injection = prepare_injection(model, config, name)
        return commit_injection(model, injection, not config.inference_mode, replication)


@contextlib.contextmanager
def deepened(model: nn.Module, config: PeftConfig) -> Iterator[Replication | None]:
    """The model with `layer_replication` done, if the configuration asks for it; an error inside undoes it."""
    method_of(config)  # raises ConfigError for anything but a configuration
    ranges = config.layer_replication
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
    """Remove an adapter, from the active ones too; wrappers that keep none become the plain layer again."""
    adapters = adapter_set(model)
    adapters.require(name)
    if name in adapters.merged:
        raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter first")
    if merged := [path for path, site in adapters.layers.items() if site.merged and site.replaced_by == (name,)]:
        raise MergeError(
            f"adapter {name!r} brought the weight of {merged[0]} (LoftQ), and {list(adapters.merged)} are merged into "
            "it; call unmerge_adapter first"
        )
    if adapters.selection.in_use[name] > 0:
        raise AdapterNameError(f"adapter {name!r} is in use by a route that is open; leave it, or wait for it, first")
    deepens = adapters.replication is not None and adapters.replication[0] == name
    if deepens and len(adapters.configs) > 1:
        raise ConfigError(f"adapter {name!r} made the model deeper (layer_replication); delete the others first")
    if name in adapters.prompts:
        _take_prompt(model, adapters, name)
    emptied = False
    for path, site in list(adapters.layers.items()):
        if name in site.adapters:
            del site.adapters[name]
        site.restore_base(name)
        if not len(site.adapters):  # also the second path of a layer that stands at two
            del adapters.layers[path]
            emptied = True
    for path, saved in list(adapters.saved.items()):
        if name in saved.copies:
            del saved.copies[name]
            if not len(saved.copies):
                del adapters.saved[path]
                emptied = True
    if emptied:
        _remove_empty_hosts(ModuleIndex(model))
    del adapters.configs[name]
    del adapters.kinds[name]
    adapters.listening = {other: taken for other, taken in adapters.listening.items() if other != name}
    if deepens and adapters.replication is not None:
        adapters.replication[1].undo()
        adapters.replication = None
    if not adapters.configs:
        adapters.restore_rows()
    adapters.selection.active = tuple(n for n in adapters.selection.active if n != name)
    adapters.selection.forget()


def _is_empty_host(module: nn.Module) -> bool:
    if isinstance(module, SavedModule):
        return not len(module.copies)
    return isinstance(module, AdapterLayer | AdapterParameters) and module.is_empty()


def _remove_empty_hosts(module_index: ModuleIndex) -> None:
    """Put back what wrappers without an adapter stand for, also inside of what is put back."""
    while empty := [m for m in module_index.modules.values() if _is_empty_host(m)]:
        for wrapper in empty:
            module_index.replace(wrapper, unwrapped(wrapper))
    fused_paths.switch(module_index)


def remove_hosts(model: nn.Module, keep_trained: bool) -> None:
    """Take every wrapper out; keep_trained leaves the active adapters' whole modules in place."""
    adapters = adapter_set(model)
    for name in list(adapters.prompts):
        _take_prompt(model, adapters, name)
    module_index = ModuleIndex(model)
    for wrapper in adapters.saved.values():
        module_index.replace(wrapper, wrapper.current() if keep_trained else wrapper.base_layer)
    for site in adapters.layers.values():
        if keep_trained:
            site.keep_base()
        else:
            site.restore_base(*site.replaced_by)
        site.adapters._modules.clear()
    adapters.layers.clear()
    _remove_empty_hosts(module_index)
    if adapters.replication is not None and not keep_trained:
        adapters.replication[1].undo()
    if not keep_trained:
        adapters.restore_rows()
    model.requires_grad_(False)
    del model.__dict__[ATTRIBUTE]
    forwarding.remove(model)
