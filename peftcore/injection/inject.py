"""Injection: putting prepared adapters into a model, and deleting adapters."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import ParameterWeight
from peftcore.bases.quantized import keep_codes
from peftcore.config import PeftConfig, TunerConfig
from peftcore.detection.layer_inputs import shared_input_groups
from peftcore.errors import AdapterNameError, ConfigError, MergeError, PeftError, TargetError
from peftcore.files.tensors import PREFIX
from peftcore.injection import forward_hooks
from peftcore.injection.adapter_set import ATTRIBUTE, PROMPTS, AdapterSet, adapter_set
from peftcore.injection.former_experts import with_fused_targets
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.preparation import (
    DEFAULT_CREATION,
    Creation,
    Injection,
    prepare_injection,
    warn_of_longer_names,
    warn_of_separated_ties,
)
from peftcore.injection.replication import Replication, replicate
from peftcore.injection.targets import target_paths, without_excluded
from peftcore.injection.torch_encoders import update_fused_paths
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.adapter_parameters import AdapterParameters
from peftcore.layers.adapter_slot import AdapterSlot
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.wrapper import unwrapped
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of

_CONFIGS = "peft_config"
"""Attribute of a model, in HF PEFT, with its adapters' configurations."""
_F = TypeVar("_F", bound=Callable[..., Any])


def _with_old_names(**names: str) -> Callable[[_F], _F]:
    """Return a decorator that accepts keyword arguments under former names, {former name: name}, with a warning."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def accepting(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warnings.warn(
                    f"{function.__name__}: the argument {old!r} is now {names[old]!r}", DeprecationWarning, stacklevel=2
                )
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(_F, accepting)

    return decorate


def commit_injection(
    model: nn.Module, injection: Injection, trainable: bool, replication: Replication | None = None
) -> AdapterSet:
    """Put a prepared adapter into the model; the first one freezes the base. The active adapters stay the same.

    Args:
        model: the model that the injection was prepared for.
        injection: the prepared adapter.
        trainable: True to train the adapter's parameters and to switch its dropout on.
        replication: the state to undo `layer_replication`, if the adapter has made the model deeper.

    Returns:
        The adapters of the model.
    """
    if ATTRIBUTE not in model.__dict__:
        injection.module_index.freeze()
        model.__dict__[ATTRIBUTE] = AdapterSet()
        forward_hooks.install(model)
    adapters, module_index = adapter_set(model), injection.module_index
    name = injection.name
    parts = _with_biases(injection)
    wrapped = [p for p, a in parts.items() if a.base.kind == "linear" and p not in adapters.layers]
    for path, adapter in parts.items():
        slot = _slot_at(path, adapter, adapters, module_index)
        if trainable:
            slot.training = True  # as with PEFT, its dropout is on at once, also on a base in evaluation mode
        elif adapter.training != slot.training:
            adapter.train(slot.training)
        _set_trainable(adapter, trainable)
        slot.place(name, adapter)
        adapter.placed()
        slot.has_trained_biases |= path in injection.biases
        if adapter.new_base is not None:
            slot.replace_base(adapter.new_base, name)
            adapter.new_base = None
        adapters.layers[path] = slot
    for path, module in injection.copies.items():
        wrapper = _wrapper_at(path, SavedModule, adapters, module_index)
        wrapper.copies[name] = module.requires_grad_(trainable).train(wrapper.training)
        adapters.saved[path] = wrapper
    update_fused_paths(module_index)
    for parent in {path.rpartition(".")[0] for path in wrapped}:
        _link_siblings(unwrapped(module_index.at(parent)), parent)
    adapters.configs[name] = injection.config
    if injection.config.restricts_others:
        adapters.restricting.add(name)
    if trainable:
        adapters.trainable.add(name)
        keep_codes(module_index.modules.values())  # gradients flow through layers without adapters, too
    adapters.kinds[name] = method_of(injection.config).adapter
    if injection.adapters:
        change_base_if_asked(adapters, name)
    arguments = adapters.kinds[name].forward_arguments(injection.config)
    if arguments is not None:  # a new dictionary, because a forward in another thread may iterate over the old one
        adapters.forward_arguments = {**adapters.forward_arguments, name: arguments}
    if injection.prompt is not None:
        _add_prompt(
            model, adapters, name, injection.prompt.requires_grad_(trainable).train(trainable or model.training)
        )
    if replication is not None:
        adapters.replication = (name, replication)
    return adapters


def change_base_if_asked(adapters: AdapterSet, name: str) -> None:
    """Change base weights for good if the initialisation of an adapter asks for it; warn if there are other adapters.

    Args:
        adapters: the adapters of the model.
        name: the adapter, whose parts are all in their layers.
    """
    if adapters.kinds[name].all_placed(adapters.of_method(name)):
        adapters.base_changed_by = name
    if adapters.base_changed_by is not None and len(adapters.configs) > 1:
        warnings.warn(
            f"the initialisation of {adapters.base_changed_by!r} changed the base weights, so another adapter of this "
            "model gives other outputs than on the original base; save it with path_initial_model_for_weight_conversion"
            ' and load that, or call peftcore.set_start_subtraction("adapter") before it is made',
            stacklevel=4,
        )


def _with_biases(injection: Injection) -> dict[str, Adapter]:
    """Return {path: adapter}. A trained bias becomes part of its layer's adapter, or a separate entry without one."""
    parts = dict(injection.adapters)
    for path, bias in injection.biases.items():
        if path in parts:
            parts[path].trained_bias = bias
        else:
            parts[path] = bias
    return parts


def _set_trainable(adapter: Adapter, trainable: bool) -> None:
    """Do `adapter.requires_grad_(trainable)`, faster for adapters without submodules."""
    if adapter._modules or adapter.frozen:
        adapter.requires_grad_(trainable)
        return
    for parameter in adapter._parameters.values():
        if parameter is not None:
            parameter.requires_grad = trainable


def _add_prompt(model: nn.Module, adapters: AdapterSet, name: str, prompt: PromptLearner) -> None:
    if not len(adapters.prompts):
        # SAM has a prompt encoder of its own
        model.add_module(f"peft_{PROMPTS}" if hasattr(model, PROMPTS) else PROMPTS, adapters.prompts)
        forward_hooks.install_prompts(model, adapters)
    adapters.prompts[name] = prompt
    prompt.attach(model, partial(adapters.selection.share, name))


def _remove_prompt(model: nn.Module, adapters: AdapterSet, name: str) -> None:
    adapters.prompts[name].detach(model)
    del adapters.prompts[name]
    if not len(adapters.prompts):
        del model._modules[next(path for path, module in model.named_children() if module is adapters.prompts)]
        forward_hooks.remove_prompts(model)


def _slot_at(path: str, adapter: Adapter, adapters: AdapterSet, module_index: ModuleIndex) -> AdapterSlot:
    if isinstance(adapter.base, ParameterWeight):
        owner = path.removesuffix(f".{adapter.base.name}")
        return _wrapper_at(owner, AdapterParameters, adapters, module_index).slot(adapter.base)
    wrapper: AdapterLayer = _wrapper_at(path, AdapterLayer, adapters, module_index)
    wrapper.take_view(adapter.base)
    return wrapper


def _wrapper_at(path: str, kind: type[Any], adapters: AdapterSet, module_index: ModuleIndex) -> Any:
    """Return the wrapper at a path; a new one is put at every path of the module."""
    present = module_index.modules[path]
    if isinstance(present, kind):
        return present
    wrapper = kind(present, adapters.selection)
    wrapper.path = path
    module_index.replace(present, wrapper)
    return wrapper


def _link_siblings(parent: nn.Module, path: str) -> None:
    """Tell each adapter layer among a module's children which later ones may read the same input."""
    for names in shared_input_groups(parent, path):
        layers = [child for name in names if isinstance(child := parent._modules[name], AdapterLayer)]
        for position, layer in enumerate(layers, 1):
            layer.siblings = layers[position:]


@_with_old_names(config="peft_config")
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an untrained adapter into any `nn.Module`, without changing its class, and make it the active one.

    The base is frozen. As in HF PEFT, the adapter has the dtype of its layers, also in 16 bits; `get_peft_model` makes
    float32 adapters. On an error the model stays as it was.

    Args:
        peft_config: the configuration of the adapter.
        model: the model; changed in place.
        adapter_name: the adapter's name. A loaded adapter of this name is replaced, with a warning, as in HF PEFT.
        low_cpu_mem_usage: True leaves the parameters on the meta device, until a saved adapter is read into them.
        state_dict: the state dict of an adapter, by the model's own paths or by PEFT's keys. Its keys name the layers
            to adapt, in place of `target_modules`; a RuntimeWarning names layers that only one of the two selects. Its
            values are not used.

    Returns:
        The model.

    Raises:
        TypeError: the second argument is not a model.
        ConfigError: an option does not fit the model.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        AdapterNameError: the name is not valid.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject_adapter_in_model needs the configuration first, then the model; got {model!r:.200}")
    if state_dict is not None:
        peft_config = with_targets_of(peft_config, state_dict, model)
    forget_removed_adapters(model)
    creation = Creation(autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
    inject_untrained(model, peft_config, adapter_name, creation)
    show_configs(model)
    return model


class Configs(MutableMapping[str, PeftConfig]):
    """{adapter: configuration} of a model whose class was not changed: its attribute `peft_config`, as in HF PEFT.

    Deleting an entry deletes the adapter.

    Args:
        model: the model with adapters.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __getitem__(self, name: str) -> PeftConfig:
        return adapter_set(self._model).configs[name]

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        raise PeftError(f"peft_config[{name!r}] cannot be set; inject_adapter_in_model adds an adapter")

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        delete_adapter_and_activate(self._model, name)

    def __iter__(self) -> Iterator[str]:
        return iter(adapter_set(self._model).configs)

    def __len__(self) -> int:
        return len(adapter_set(self._model).configs)

    def __repr__(self) -> str:
        return repr(adapter_set(self._model).configs)


def show_configs(model: nn.Module) -> None:
    """Give a model the attribute `peft_config`, unless its class has one."""
    if not hasattr(type(model), _CONFIGS):
        model.__dict__[_CONFIGS] = Configs(model)


def keeps_class(model: nn.Module) -> bool:
    """Return True for a model with adapters whose class was not changed to a `PeftModel`."""
    return _CONFIGS in model.__dict__ and not hasattr(type(model), _CONFIGS)


def forget_removed_adapters(model: nn.Module) -> None:
    """Remove the remaining state of adapters if the model's attribute `peft_config` was deleted.

    diffusers unloads adapters by restoring the base layers and deleting this attribute.

    Args:
        model: a model with or without adapters; changed in place.
    """
    adapters = model.__dict__.get(ATTRIBUTE)
    if adapters is None or hasattr(model, _CONFIGS):
        return
    for slot in adapters.layers.values():
        slot.unmerged_state = None  # merged weights stay merged, as in HF PEFT
    remove_wrappers(model, keep_trained=True)


def inject_untrained(
    model: nn.Module, config: PeftConfig, name: str, creation: Creation = DEFAULT_CREATION
) -> nn.Module:
    """Put an untrained adapter into the model, in place of one of the same name, and make it the active one.

    Args:
        model: the model; changed in place.
        config: the configuration.
        name: the adapter's name.
        creation: options for its parameters.

    Returns:
        The model.

    Raises:
        ConfigError, TargetError, AdapterNameError: see `inject_adapter_in_model`.
    """
    config = with_fused_targets(config, model)
    if ATTRIBUTE in model.__dict__ and name in adapter_set(model).configs:
        with deepened(model, config), _generators_kept(model):
            prepare_injection(model, config, name, creation, replaces=True)  # so that errors come before the deletion
        delete_adapter(model, name)
        warnings.warn(
            f"adapter {name!r} was loaded already and is replaced by an untrained one; to keep both, "
            "give the new one another adapter_name",
            stacklevel=3,
        )
    adapters = add_adapter(model, config, name, creation)
    adapters.selection.active = (name,)
    return model


def _generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context at whose end the random generators of the CPU and of the model's GPUs are as before."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices, device_type="cuda")


def with_targets_of(config: PeftConfig, state_dict: Mapping[str, Tensor], model: nn.Module) -> PeftConfig:
    """Return the configuration with the layers to which the keys of a state dict belong as its targets."""
    if not isinstance(config, TunerConfig):
        raise ConfigError(f"state_dict names layers, and {type(config).__name__} adapts none; leave it out")
    module_index = ModuleIndex(model)
    modules, targets = module_index.modules, set()
    for key in state_dict:
        path, own = key.removeprefix(PREFIX), ""
        while path and path not in modules:
            path, _, name = path.rpartition(".")
            own = f"{name}.{own}" if own else name
        if path and own not in unwrapped(modules[path])._parameters:  # otherwise a tensor of the base
            targets.add(path)
    if not targets:
        example = next(iter(state_dict), "nothing")
        raise TargetError(
            f"state_dict names no layer of this {type(model).__name__}; it holds {example!r}; give the state dict of "
            "an adapter for this model, or leave it out"
        )
    _warn_of_other_targets(module_index, config, targets)
    return dataclasses.replace(
        config, target_modules=sorted(targets), exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def _warn_of_other_targets(module_index: ModuleIndex, config: TunerConfig, targets: Collection[str]) -> None:
    """Warn of layers that a configuration selects and the keys of a state dict do not, and of the reverse."""
    try:
        selected = set(without_excluded(target_paths(module_index, config), config))
    except TargetError:  # the model has no default targets, which is why the state dict names them
        return
    targets = set(targets)
    differences = {"the configuration": selected - targets, "state_dict": targets - selected}
    listed = [f"only {source} names {sorted(paths)[:5]}" for source, paths in differences.items() if paths]
    if listed:
        warnings.warn(
            f"inject_adapter_in_model adapts the {len(targets)} layers that state_dict names; {'; '.join(listed)}",
            RuntimeWarning,
            stacklevel=5,
        )


def add_adapter(model: nn.Module, config: PeftConfig, name: str, creation: Creation = DEFAULT_CREATION) -> AdapterSet:
    """Put an untrained adapter into the model, without making it active. On an error the model stays as it was.

    Args:
        model: the model; changed in place.
        config: the configuration; the adapter is trainable unless it says `inference_mode`.
        name: the adapter's name.
        creation: options for its parameters.

    Returns:
        The adapters of the model.

    Raises:
        ConfigError: an option does not fit the model.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        AdapterNameError: the name is not valid, or taken.
    """
    config = with_fused_targets(config, model)
    with deepened(model, config) as replication:
        injection = prepare_injection(model, config, name, creation)
        warn_of_separated_ties(injection)
        warn_of_longer_names(injection)
        return commit_injection(model, injection, not config.inference_mode, replication)


@contextlib.contextmanager
def deepened(model: nn.Module, config: PeftConfig) -> Iterator[Replication | None]:
    """Do `layer_replication`, if the configuration asks for it; an error inside of the context undoes it.

    Args:
        model: the model; changed in place.
        config: the configuration.

    Yields:
        The state to undo the replication; None without one.

    Raises:
        ConfigError: the model has adapters already, or a range does not fit.
    """
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


def check_deletable(model: nn.Module, *names: str) -> None:
    """Check that adapters can be deleted, all of them.

    Args:
        model: the model.
        names: the adapters.

    Raises:
        AdapterNameError: an adapter is not loaded, or in use by an open route.
        MergeError: an adapter is merged, or others are merged into a weight that it replaced (LoftQ).
        ConfigError: an adapter made the model deeper, and others would be left.
    """
    adapters = adapter_set(model)
    adapters.require(*names)
    if merged := [name for name in names if name in adapters.merged]:
        raise MergeError(f"{merged} are merged into the base, so they cannot be deleted; call unmerge_adapter first")
    for path, slot in adapters.layers.items():
        if slot.merged_names and slot.replaced_by and set(slot.replaced_by) <= set(names):
            raise MergeError(
                f"{list(slot.replaced_by)} replaced the weight of {path} (LoftQ), and {list(adapters.merged)} are "
                "merged into it; call unmerge_adapter first"
            )
    for name in names:
        _check_unused(adapters, name)
        if adapters.deepened_by(name) and adapters.configs.keys() - set(names):
            raise ConfigError(f"adapter {name!r} made the model deeper (layer_replication); delete the others first")


def _check_unused(adapters: AdapterSet, name: str) -> None:
    if adapters.selection.in_use[name] > 0:
        raise AdapterNameError(
            f"adapter {name!r} is in use by an open route; leave the route, or wait for its end, first"
        )


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter; wrappers without an adapter are removed, and the plain layer is in their place again.

    Args:
        model: the model; changed in place.
        name: the adapter; also removed from the active ones.

    Raises:
        AdapterNameError, MergeError, ConfigError: see `check_deletable`.
    """
    check_deletable(model, name)
    adapters = adapter_set(model)
    deepens = adapters.deepened_by(name)
    with adapters.selection.locked():
        _check_unused(adapters, name)
        adapters.forward_arguments = {n: own for n, own in adapters.forward_arguments.items() if n != name}
        adapters.restricting.discard(name)
        del adapters.configs[name]  # first, so that no other thread opens a route to an adapter that is half deleted
    if name in adapters.prompts:
        _remove_prompt(model, adapters, name)
    emptied = False
    for path, slot in list(adapters.layers.items()):
        if name in slot.adapters:
            del slot.adapters[name]
        slot.restore_base(name)
        if not len(slot.adapters):  # a layer may have two paths
            del adapters.layers[path]
            emptied = True
    for path, saved in list(adapters.saved.items()):
        if name in saved.copies:
            del saved.copies[name]
            if not len(saved.copies):
                del adapters.saved[path]
                emptied = True
    if emptied:
        _remove_empty_wrappers(ModuleIndex(model))
    del adapters.kinds[name]
    adapters.trainable.discard(name)
    if deepens and adapters.replication is not None:
        adapters.replication[1].undo()
        adapters.replication = None
    if not adapters.configs:
        adapters.restore_rows()
    adapters.deactivate(name)
    adapters.selection.forget()


def delete_adapter_and_activate(model: nn.Module, *names: str) -> None:
    """Delete adapters. If all active ones are deleted, another one becomes active, as in HF PEFT.

    That is the first remaining adapter by name, or after a prompt the one that was added first.

    Args:
        model: the model with adapters.
        names: the adapters.

    Raises:
        AdapterNameError, MergeError, ConfigError: see `check_deletable`. No adapter is deleted then.
    """
    adapters = adapter_set(model)
    check_deletable(model, *names)
    active = [name for name in names if name in adapters.selection.active]
    by_age = any(name in adapters.prompts for name in active)
    for name in sorted(dict.fromkeys(names), key=adapters.deepened_by):  # `layer_replication`'s adapter last
        delete_adapter(model, name)
    if active and adapters.configs and not adapters.selection.active:
        first = next(iter(adapters.configs)) if by_age else min(adapters.configs)
        adapters.selection.active = (first,)
        if not adapters.configs[first].inference_mode:
            adapters.set_requires_grad([first], True)
        warnings.warn(f"the active adapters {active} are deleted; {first!r} is the active one now", stacklevel=4)


def _is_empty_wrapper(module: nn.Module) -> bool:
    return isinstance(module, AdapterLayer | AdapterParameters | SavedModule) and module.is_empty()


def _remove_empty_wrappers(module_index: ModuleIndex) -> None:
    """Replace wrappers without adapters by their base layers, also wrappers inside of these."""
    while empty := [m for m in module_index.modules.values() if _is_empty_wrapper(m)]:
        for wrapper in empty:
            module_index.replace(wrapper, unwrapped(wrapper))
    update_fused_paths(module_index)


def remove_wrappers(model: nn.Module, keep_trained: bool) -> None:
    """Remove every wrapper.

    Args:
        model: the model; changed in place.
        keep_trained: True keeps the trained copies of the active adapters, and base weights that adapters replaced;
            False restores the model from before the first adapter.
    """
    adapters = adapter_set(model)
    for name in list(adapters.prompts):
        _remove_prompt(model, adapters, name)
    module_index = ModuleIndex(model)
    for wrapper in adapters.saved.values():
        module_index.replace(wrapper, wrapper.current() if keep_trained else wrapper.base_layer)
    for slot in adapters.layers.values():
        if keep_trained:
            slot.keep_base()
        else:
            slot.restore_base(*slot.replaced_by)
        slot.adapters.clear()
    adapters.layers.clear()
    _remove_empty_wrappers(module_index)
    if adapters.replication is not None:
        replication = adapters.replication[1]
        replication.separate() if keep_trained else replication.undo()
    if not keep_trained:
        adapters.restore_rows()
    model.requires_grad_(False)
    del model.__dict__[ATTRIBUTE]
    model.__dict__.pop(_CONFIGS, None)
    forward_hooks.remove(model)
