"""Preparation: making an adapter for a model and checking it, without changing the model."""

import contextlib
import copy
import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from peftcore._util.both_libraries import refuse_layers_of_hf_peft
from peftcore._util.patterns import is_suffix
from peftcore.adapter import Adapter, Shared
from peftcore.bases import (
    BaseWeight,
    BiasParameter,
    Conv1DWeight,
    ParameterWeight,
    base_weight,
    is_adaptable,
    raw_projections,
)
from peftcore.bases.offload import offload_hook
from peftcore.config import PeftConfig, PromptLearningConfig, TunerConfig
from peftcore.errors import AdapterNameError, ConfigError, MergeError, NoMatchingPeftModuleError, TargetError
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import (
    NO_TARGETS,
    checked_targets,
    complete,
    find_parameters,
    find_saved_modules,
    is_within,
    named,
    says_untied,
    target_paths,
    tied_paths,
    tied_weights,
    warn_of_unused_exclusions,
    with_heads,
)
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.adapter_parameters import AdapterParameters
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.trained_bias import TrainedBias, TrainedBiasParameter
from peftcore.layers.wrapper import unwrapped
from peftcore.prompts.learner import PromptLearner
from peftcore.registry import method_of


@dataclasses.dataclass
class Injection:
    """An adapter that is made and checked, and not in the model yet."""

    name: str
    config: PeftConfig
    adapters: dict[str, Adapter]
    """{path of a layer or raw parameter: adapter}"""
    copies: dict[str, nn.Module]
    """{path: trainable copy of a module}"""
    biases: dict[str, TrainedBias]
    """{path of a layer, or of a raw bias: trained bias}"""
    module_index: ModuleIndex
    """The model's modules at that time."""
    prompt: PromptLearner | None = None


@dataclasses.dataclass(frozen=True)
class Creation:
    """Options for making an adapter's parameters, under HF PEFT's names."""

    initialise: bool = True
    """False skips the initialisation, for a caller that then reads every tensor from disk."""
    autocast_adapter_dtype: bool = True
    """False: parameters in the dtype of their layer. True: float32 if the layer has 16 bits or fewer."""
    low_cpu_mem_usage: bool = False
    """True: parameters of layers without values, on the meta device, until a saved adapter is read into them."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not isinstance(value := getattr(self, field.name), bool):
                raise ConfigError(f"{field.name} must be True or False; got {value!r:.200}")


DEFAULT_CREATION = Creation()


def prepare_injection(
    model: nn.Module,
    config: PeftConfig,
    name: str,
    creation: Creation = DEFAULT_CREATION,
    replaces: bool = False,
) -> Injection:
    """Make the modules of an adapter, without changing the model.

    Args:
        model: the model, with or without adapters.
        config: the user's configuration; stays as it is.
        name: the adapter's name.
        creation: options for its parameters. As in HF PEFT, they do not apply to prompts and to copies of modules
            (`modules_to_save`).
        replaces: True if the caller will delete the loaded adapter of this name, so that it restricts nothing.

    Raises:
        AdapterNameError: the name is not valid, or taken.
        ConfigError: an option does not fit the model or its adapters.
        TargetError: no layer matches, or a matching layer cannot be adapted.
        MergeError: the initialisation replaces a weight into which adapters are merged (LoftQ).
    """
    kind = method_of(config).adapter
    replaced = name if replaces else None
    config.check_complete()
    if issubclass(kind, PromptLearner):
        return _prepare_prompt(model, kind, config, name, creation.initialise, replaced)
    if not isinstance(config, TunerConfig):
        raise ConfigError(
            f"{type(config).__name__} does not adapt layers; use that of an adapter method, such as LoraConfig"
        )
    _check_name(model, name, replaced)
    _check_beside(model, config, replaced)
    _check_not_compiled(model)
    module_index = ModuleIndex(model)
    refuse_layers_of_hf_peft((model, *module_index.modules.values()))
    config, paths = complete(module_index, config)
    if config.ensure_weight_tying and says_untied(model):
        _warn_of_ties_without_effect("no tied modules were found in the model: it has tie_word_embeddings=False")
        config = dataclasses.replace(config, ensure_weight_tying=False)
    saved = find_saved_modules(module_index, config)
    adapters = _adapters_for(module_index, config, paths, creation)
    occupied = {*adapters, *_owners_of_raw_parameters(adapters)}
    adapters |= _token_adapters(module_index, config, occupied, {*saved}, creation)
    if config.ensure_weight_tying:
        _warn_without_ties(module_index, [*adapters, *saved])
    _check_new_bases(module_index, adapters, replaced)
    if creation.initialise:
        _warn_of_unused(config)
        _warn_of_unmatched_patterns(config, adapters)
    config = _with_orientation(config, adapters)
    biases = _trained_biases(module_index, config, adapters, saved, replaced)
    if not creation.autocast_adapter_dtype:
        _narrow([*adapters.values(), *biases.values()])
    if creation.low_cpu_mem_usage:
        for module in {id(m): m for adapter in adapters.values() for m in adapter.modules()}.values():
            _forget_values(module)  # includes the tensors that the layers share
    return Injection(name, config, adapters, _copies_of(module_index, config, saved), biases, module_index)


def _check_beside(model: nn.Module, config: PeftConfig, replaced: str | None) -> None:
    """Check that the model can have this adapter beside all others but the replaced one. Raises ConfigError."""
    if ATTRIBUTE not in model.__dict__:
        return
    adapters = adapter_set(model)
    for name, other in adapters.configs.items() if config.restricts_others else ():
        if name != replaced:
            config.check_beside(other)
    for name in adapters.restricting - {replaced}:
        adapters.configs[name].check_beside(config)


_SIZES = ("token_dim", "num_attention_heads", "num_layers")
"""Fields of a prompt's configuration that may be read from the model."""


def _warn_of_unused(config: PeftConfig) -> None:
    for option, setting in config.without_effect().items():
        warnings.warn(f"{option} has no effect without {setting}; leave it out", stacklevel=2)


def _prepare_prompt(
    model: nn.Module, kind: type[PromptLearner], config: PeftConfig, name: str, initialise: bool, replaced: str | None
) -> Injection:
    _check_name(model, name, replaced)
    _check_beside(model, config, replaced)
    _check_not_compiled(model)
    if initialise:
        _warn_of_unused(config)
    module_index = ModuleIndex(model)
    refuse_layers_of_hf_peft((model, *module_index.modules.values()))
    given, copies = config, {}
    config = kind.completed(config, model)
    for option in _SIZES if initialise else ():
        if (size := getattr(given, option, None)) not in (None, getattr(config, option, None)):
            warnings.warn(f"{option}={size} has no effect: the model has {getattr(config, option)}", stacklevel=2)
    if isinstance(config, PromptLearningConfig | TunerConfig):
        whole: Any = config
        whole = config = with_heads(module_index, whole)
        copies = {path: _copy_of(module, path) for path, module in find_saved_modules(module_index, whole).items()}
    weight = next(model.parameters())
    with torch.device(weight.device):
        prompt = kind(config, model)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    prompt.to(wide)
    if initialise:
        prompt.reset_parameters(model)
    return Injection(name, config, {}, copies, {}, module_index, prompt)


def _adapters_for(
    module_index: ModuleIndex,
    config: TunerConfig,
    paths: list[str],
    creation: Creation,
    separate: Collection[str] = (),
) -> dict[str, Adapter]:
    """Make {path: adapter} for the targets of a configuration; those at `separate` follow no tied weight."""
    kind = method_of(config).adapter
    targets = checked_targets(module_index, config, paths, is_saved=not creation.initialise)
    if creation.initialise:
        warn_of_unused_exclusions(config, paths)
    if kind.follows_ties or config.ensure_weight_tying:
        ties = (path for path in tied_paths(module_index, targets) if path not in separate)
        targets |= {path: module_index.modules[path] for path in ties}
    bases: dict[str, BaseWeight] = {}
    for path, layer in targets.items():
        for base in _bases_of(kind, config, layer, path):
            bases[f"{path}.{base.name}" if isinstance(base, ParameterWeight) else path] = base
    parameters = _parameter_bases(module_index, config)
    if both := [path for path in parameters if path.rpartition(".")[0] in bases]:
        raise TargetError(
            f"target_parameters: {both[0]} belongs to a layer of target_modules; name it in one of the two"
        )
    bases |= parameters
    if not bases and config.target_modules != NO_TARGETS:
        raise NoMatchingPeftModuleError(
            f"neither target_modules={config.target_modules!r} nor target_parameters={config.target_parameters!r} "
            "names a part of this model"
        )
    adapters = _make_adapters(kind, config, bases, creation)
    kind.link(config, adapters)
    _set_parameter_prefixes(adapters)
    return adapters


def _warn_of_unmatched_patterns(config: TunerConfig, paths: Iterable[str]) -> None:
    """Warn of keys of `rank_pattern` and `alpha_pattern` that match no adapted layer, as HF PEFT does."""
    if not hasattr(config, "alpha_pattern"):  # rank_pattern alone has other keys: masks of AdaLoRA, parts of paths
        return
    paths = list(paths)
    for option in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, option) or {}
        if unmatched := sorted(key for key in keys if not any(is_suffix(key, path) for path in paths)):
            warnings.warn(
                f"{option}: {', '.join(unmatched)} match no adapted layer and have no effect; correct or remove them",
                RuntimeWarning,
                stacklevel=2,
            )


def _with_orientation(config: TunerConfig, adapters: Mapping[str, Adapter]) -> TunerConfig:
    """Return a copy whose `fan_in_fan_out` says if a layer is a Conv1D, as HF PEFT saves it.

    Warns if the option was True without such a layer.
    """
    stated = getattr(config, "fan_in_fan_out", None)
    if not adapters or stated is None:
        return config
    has_conv1d = any(isinstance(adapter.base, Conv1DWeight) for adapter in adapters.values())
    if stated and not has_conv1d:
        warnings.warn(
            "fan_in_fan_out=True has no effect, because none of the layers is a Conv1D: the orientation of a weight is "
            "found per layer; leave the option out",
            stacklevel=2,
        )
    if stated != has_conv1d:
        config = copy.copy(config)
        vars(config)["fan_in_fan_out"] = has_conv1d
    return config


def _set_parameter_prefixes(adapters: Mapping[str, Adapter]) -> None:
    """Set `disk_prefix`: PEFT wraps a module once for each of its raw parameters, the last one outermost."""
    inside: Counter[str] = Counter()
    for path, adapter in reversed(list(adapters.items())):
        if adapter.base.kind == "parameter":
            owner = path.rpartition(".")[0]
            adapter.disk_prefix = "base_layer." * inside[owner]
            inside[owner] += 1


def _parameter_bases(module_index: ModuleIndex, config: TunerConfig) -> dict[str, BaseWeight]:
    parameters = find_parameters(module_index, config)
    return {path: ParameterWeight(module, name) for path, (module, name) in parameters.items()}


def _token_adapters(
    module_index: ModuleIndex, config: TunerConfig, taken: set[str], saved: set[str], creation: Creation
) -> dict[str, Adapter]:
    """Return the adapters of single embedding rows (`trainable_token_indices`).

    Layers with one weight train the same rows, unless the configuration names different rows for them.
    """
    adapters: dict[str, Adapter] = {}
    targets = [(one, target_paths(module_index, one)) for one in config.token_configs()]
    tokens = {path: set(one.token_indices) for one, paths in targets for path in paths}
    for one, paths in targets:
        others = {path for path, indices in tokens.items() if indices != set(one.token_indices)}
        if config.ensure_weight_tying and (ties := others & tied_paths(module_index, paths).keys()):
            raise ConfigError(
                f"ensure_weight_tying: {paths[0]} and {min(ties)} share a weight, and trainable_token_indices has "
                "different tokens for them; give both the same"
            )
        adapters |= _adapters_for(module_index, one, paths, creation, others)
    if both := sorted(adapters.keys() & taken):
        raise ConfigError(f"trainable_token_indices: {both[0]} is a target itself; leave it out of one of the two")
    if whole := sorted(path for path in adapters if is_within(path, saved)):
        raise ConfigError(
            f"trainable_token_indices: {whole[0]} trains in full (modules_to_save); leave out one of the two"
        )
    for adapter in adapters.values():
        adapter.disk_prefix = "token_adapter."
    return adapters


def _bases_of(kind: type[Adapter], config: TunerConfig, layer: nn.Module, path: str) -> list[BaseWeight]:
    """Return the weights of one target: one, or the two raw projections of an nn.MultiheadAttention."""
    if isinstance(layer, AdapterLayer):
        bases: list[BaseWeight] = [layer.base]
    else:
        layer = unwrapped(layer)
        bases = [ParameterWeight(layer, name) for name in raw_projections(layer)] or [base_weight(layer, path)]
    if bases[0].kind not in kind.layer_kinds:
        word = type(layer).__name__ if isinstance(layer, nn.MultiheadAttention) else bases[0].kind
        fits = ", ".join(sorted(kind.layer_kinds))
        raise TargetError(f"{config.method} does not adapt {word} layers such as {path}; it adapts {fits}")
    return bases


def _make_adapters(
    kind: type[Adapter], config: TunerConfig, bases: dict[str, BaseWeight], creation: Creation
) -> dict[str, Adapter]:
    first = next(iter(bases.values()), None)
    if first is None:
        return {}
    default = torch.get_default_device()
    with _created_on(first.device, default):
        shared = kind.make_shared(config, bases)
        if shared is not None:
            shared.to(_wide(first.dtype))
    adapters = {}
    for path, base in bases.items():
        with _created_on(base.device, default):
            adapters[path] = adapter = _make(kind, config, base, path, shared)
            if creation.initialise and not creation.low_cpu_mem_usage:
                adapter.reset_parameters()
                _round_start(adapter, base)
            else:
                adapter.prepare_to_read()
                vars(adapter).update(is_unread=config.inference_mode and not creation.initialise)
            if creation.low_cpu_mem_usage:
                _forget_values(adapter)
    if creation.initialise and not creation.low_cpu_mem_usage and shared is not None:
        _round_start(shared, first)
    return adapters


@torch.no_grad()
def _round_start(module: Adapter | Shared, base: BaseWeight) -> None:
    """Round start values to 16 bits if the base computes in 16 bits, as HF PEFT does before it widens them again."""
    dtype = base.activation_dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return
    exact = module._non_persistent_buffers_set | module.unrounded
    deep = isinstance(module, Adapter)  # modules inside of a `Shared` are read from disk (X-LoRA's experts)
    for name, tensor in itertools.chain(module.named_parameters(recurse=deep), module.named_buffers(recurse=deep)):
        if name not in exact and not name.startswith("shared.") and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _forget_values(module: nn.Module) -> None:
    """Move a module's own parameters to the meta device, which frees their memory."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def _narrow(adapters: list[Adapter]) -> None:
    """Cast adapters to the dtype of their layers if it has 16 bits; on 4-bit layers, to the layers' compute dtype."""
    for adapter in adapters:
        base = adapter.base
        dtype = base.activation_dtype
        if dtype in (torch.float16, torch.bfloat16):
            adapter.to(dtype)


def _make(kind: type[Adapter], config: TunerConfig, base: BaseWeight, path: str, shared: Shared | None) -> Adapter:
    if isinstance(base, ParameterWeight) and raw_projections(base.layer):
        path = path.removesuffix(f".{base.name}")  # `rank_pattern` and the like name the target module
    adapter = kind(config, base, path)
    _widen(adapter, _wide(base.dtype))
    if shared is not None:
        adapter.shared = shared
    return adapter


def _created_on(device: torch.device, default: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which new tensors are created on `device`.

    For the default device the context does nothing, because PyTorch's device context slows every call inside.
    """
    return contextlib.nullcontext() if device == default else torch.device(device)


@cache
def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapter parameters for a base of this dtype: float32, or wider if the base is wider."""
    return torch.promote_types(dtype, torch.float32)


def _widen(adapter: Adapter, dtype: torch.dtype) -> None:
    """Do `adapter.to(dtype)`, but only if a tensor has another type, because `to` is slow."""
    tensors = itertools.chain(adapter._parameters.values(), adapter._buffers.values())
    if adapter._modules or any(t is not None and t.dtype != dtype for t in tensors):
        adapter.to(dtype)


def _copies_of(module_index: ModuleIndex, config: TunerConfig, saved: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Make the trainable copies; with `ensure_weight_tying`, both sides of a tied pair, with one weight.

    Raises:
        ConfigError: accelerate has offloaded the weights of a module.
    """
    copies = {path: _copy_of(module, path) for path, module in saved.items()}
    if config.ensure_weight_tying:
        for path, other in tied_paths(module_index, saved).items():
            copies[path] = _copy_of(module_index.modules[path], path)
            copies[path].weight = copies[other].weight
    return copies


def _copy_of(module: nn.Module, path: str) -> nn.Module:
    original = module.base_layer if isinstance(module, SavedModule) else module
    if any(offload_hook(part) is not None for part in original.modules()):
        raise ConfigError(
            f"modules_to_save: accelerate has offloaded the weights of {path!r}, so there is nothing to copy; make or "
            "load the adapter first, and offload the model then"
        )
    return copy.deepcopy(original).requires_grad_(True)


def _warn_without_ties(module_index: ModuleIndex, paths: list[str]) -> None:
    """Warn if `ensure_weight_tying` has no effect, because no weight of these paths has two modules."""
    tied = tied_weights(module_index)
    if not tied:
        reason = "no tied modules were found in the model"
    elif not any(path in group for group in tied for path in paths):
        reason = f"no tied modules are added to the adapter; the model ties {tied[0]}"
    else:
        return
    _warn_of_ties_without_effect(reason)


def _warn_of_ties_without_effect(reason: str) -> None:
    warnings.warn(f"ensure_weight_tying=True has no effect: {reason}", stacklevel=6)


def warn_of_separated_ties(injection: Injection) -> None:
    """Warn if an adapter changes an embedding, or a layer that shares an embedding's weight, and leaves the other.

    Args:
        injection: the prepared adapter.
    """
    config, modules = injection.config, injection.module_index.modules
    if not isinstance(config, TunerConfig) or config.ensure_weight_tying or says_untied(injection.module_index.model):
        return
    changed = {path for path, adapter in injection.adapters.items() if not adapter.follows_ties} | {*injection.copies}
    for group in tied_weights(injection.module_index):
        path = next((path for path in group if path in changed), None)
        if path is None or not any(isinstance(unwrapped(modules[other]), nn.Embedding) for other in group):
            continue
        advice = (
            "set ensure_weight_tying=True to change them in the same way"
            if "ensure_weight_tying" in type(config).__dataclass_fields__
            else f"no implementation exists to tie the adapters of {config.method}"
        )
        warnings.warn(
            f"{' and '.join(group)} share a weight, and the adapter changes {path} by itself, so that they are no "
            f"longer tied once it is merged; {advice}",
            stacklevel=5,
        )
        return


def warn_of_longer_names(injection: Injection) -> None:
    """Warn of modules whose names end with a name in `modules_to_save`, because HF PEFT would train them, too.

    Args:
        injection: the prepared adapter.
    """
    names = getattr(injection.config, "modules_to_save", None)
    if not names or isinstance(names, str):
        return
    taken = {*injection.copies, *injection.adapters}
    longer = {
        path: name
        for path, module in injection.module_index.modules.items()
        if (name := next((name for name in names if path.endswith(name) and not named(path, [name])), None))
        if not is_within(path, taken) and any(True for _ in unwrapped(module).parameters())
    }
    if not longer:
        return
    name = next(iter(longer.values()))
    paths = [path for path, other in longer.items() if other == name]
    matches = [path for path in injection.copies if named(path, [name])]
    listed = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    further = ", ".join(dict.fromkeys(repr(path.rpartition(".")[2]) for path in paths))
    alone = f"; to leave them, write {matches[0]!r}" if matches and name not in matches else ""
    warnings.warn(
        f"modules_to_save: {name!r} names {', '.join(matches[:3]) or 'no module'} here. HF PEFT also trains modules "
        f"whose names end with it: {listed}. To train them, too, add {further}{alone}",
        stacklevel=5,
    )


def _check_name(model: nn.Module, name: str, replaced: str | None) -> None:
    if not name or not isinstance(name, str) or "." in name or "/" in name:
        raise AdapterNameError(
            f"an adapter's name is a string, which must not be empty or contain '.' or '/'; got {name!r}"
        )
    if name != replaced and ATTRIBUTE in model.__dict__ and name in adapter_set(model).configs:
        raise AdapterNameError(f"there is already an adapter named {name!r}; delete it first or take another name")


def _check_not_compiled(model: nn.Module) -> None:
    classes = {c.__name__ for c in type(model).__mro__}
    for wrapper, call in (("OptimizedModule", "torch.compile"), ("FSDPModule", "fully_shard")):
        if wrapper in classes:
            raise ConfigError(f"adapters must be attached before {call}; attach first, then call {call}")


def _check_new_bases(module_index: ModuleIndex, adapters: Mapping[str, Adapter], replaced: str | None) -> None:
    """Raise MergeError or ConfigError if an adapter would replace a base weight that others use (LoftQ, KaSA)."""
    for path, adapter in adapters.items():
        wrapper = module_index.modules.get(path)
        if adapter.new_base is None or not isinstance(wrapper, AdapterLayer):
            continue
        if wrapper.merged_names:
            raise MergeError(
                f"the adapter replaces the weight of {path} (LoftQ or KaSA), and {wrapper.merged_adapters} are merged "
                "into it; call unmerge_adapter first"
            )
        others = [name for name in wrapper.replaced_by if name != replaced]
        if others and not torch.equal(wrapper.base.read(), adapter.new_base.to(wrapper.base.dtype)):
            raise ConfigError(
                f"{others} replaced the weight of {path} (LoftQ or KaSA), and this adapter requires "
                "another weight there; give both the same loftq_config and r, or delete the first"
            )


def _owners_of_raw_parameters(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return the paths of the modules whose raw parameters are adapted."""
    raw = ((path, a.base) for path, a in adapters.items() if isinstance(a.base, ParameterWeight))
    return [path.removesuffix(f".{base.name}") for path, base in raw]


def _trained_biases(
    module_index: ModuleIndex,
    config: TunerConfig,
    adapters: Mapping[str, Adapter],
    saved: Mapping[str, nn.Module],
    replaced: str | None,
) -> dict[str, TrainedBias]:
    """Make the trained biases: of the adapter's layers, or of all modules that it does not train in full."""
    mode = config.bias
    if mode == "none":
        return {}
    targeted = dict.fromkeys([*adapters, *_owners_of_raw_parameters(adapters)])
    paths = [path for path in targeted if path in module_index.modules]
    paths = paths if mode.endswith("_only") else list(module_index.modules)
    paths = [path for path in paths if not is_within(path, saved)]
    biases: dict[str, TrainedBias] = {}
    raw = {id(adapter.base.layer) for adapter in adapters.values() if isinstance(adapter.base, ParameterWeight)}
    first: dict[int, nn.Parameter] = {}
    """{id of a bias of the base: its trained bias}; tied biases stay tied"""
    for path in paths:
        module = module_index.modules[path]
        in_full = isinstance(module, SavedModule) and any(name != replaced for name in module.copies)
        if in_full and any(name.endswith("bias") for name, _ in unwrapped(module).named_parameters()):
            raise ConfigError(
                f"bias={mode!r}: {path} is trained in full (modules_to_save) by another adapter; use bias='none', or "
                f"name {path} in this adapter's modules_to_save too"
            )
        base_bias = unwrapped(module)._parameters.get("bias")
        if base_bias is None:
            continue
        is_raw = isinstance(module, AdapterParameters) or id(unwrapped(module)) in raw
        trained = _trained_bias(path, module, adapters.get(path), first.get(id(base_bias)), is_raw)
        first[id(base_bias)] = trained.bias
        biases[f"{path}.bias" if isinstance(trained, TrainedBiasParameter) else path] = trained
    return biases


def _trained_bias(
    path: str, module: nn.Module, adapter: Adapter | None, tied: nn.Parameter | None, is_raw: bool
) -> TrainedBias:
    """Make the trained bias of a module; `is_raw` says that adapters of the module are on its raw parameters."""
    layer = unwrapped(module)
    if adapter is not None:
        return TrainedBias(adapter.base, path, tied)
    if isinstance(module, AdapterLayer):
        return TrainedBias(module.base, path, tied)
    if is_adaptable(layer) and not is_raw:
        return TrainedBias(base_weight(layer, path), path, tied)
    return TrainedBiasParameter(BiasParameter(layer, "bias"), path, tied)
