"""Target resolution: from `target_modules` (names, a regular expression, or "all-linear") to layers.

Names match whole path segments: "head" matches `head` and `decoder.head`, never `overhead`.
"""

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from peftcore._util.patterns import matched
from peftcore.bases import base_weight, calls_layer, is_adaptable, kernel_reads, raw_projections
from peftcore.config import ALL_LINEAR, BLOCK, PromptLearningConfig, TaskType, TunerConfig
from peftcore.detection import detect
from peftcore.detection.defaults import GIVEN_TARGETS
from peftcore.detection.model_kind import model_type_of
from peftcore.errors import NoMatchingPeftModuleError, TargetError, suggestion
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.adapter_parameters import AdapterParameters
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.wrapper import unwrapped
from peftcore.registry import method_of

MANY_TARGETS = 20
"""Number of listed `target_modules` from which on shorter names are looked for; HF PEFT's number."""

NO_TARGETS = "dummy-target-modules"
"""Value of `target_modules` for an adapter without layers; HF PEFT's."""

C = TypeVar("C", TunerConfig, PromptLearningConfig)

TASK_HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""{task: names of its heads}: PEFT trains and saves these with the adapter, because they start untrained."""
PRE_CLASSIFIER = "pre_classifier"
"""A layer of DistilBERT's head, which PEFT matches as "classifier"."""


def named(path: str, names: Collection[str] | None) -> bool:
    """Return True if a path matches.

    Args:
        path: the path of a module or parameter.
        names: a regular expression for the whole path, or path suffixes. A set is fastest for many names.
    """
    if not names:
        return False
    if isinstance(names, str):
        return matched(names, path) is not None
    dot = "."
    while dot:
        if path in names:
            return True
        _, dot, path = path.partition(".")
    return False


def find_targets(model: nn.Module, config: TunerConfig) -> dict[str, nn.Module]:
    """Return the layers of a model that a configuration adapts.

    Args:
        model: the model, with or without adapters.
        config: the configuration, as the user wrote it or as `complete` returned it.

    Returns:
        {path: layer}; the wrapper in place of a layer that has one.

    Raises:
        TargetError: nothing matches, or a match cannot be adapted.
    """
    module_index = ModuleIndex(model)
    return checked_targets(module_index, config, target_paths(module_index, config))


def warn_of_unused_exclusions(config: TunerConfig, paths: Collection[str]) -> None:
    """Warn if `exclude_modules` names none of the layers that `target_modules` matches.

    Args:
        config: the configuration.
        paths: what `target_paths` returned for this configuration.
    """
    if config.exclude_modules and paths and not any(named(path, config.exclude_modules) for path in paths):
        warnings.warn(
            f"exclude_modules {config.exclude_modules!r} has no effect: it matches no layer of target_modules",
            stacklevel=2,
        )


def checked_targets(
    module_index: ModuleIndex, config: TunerConfig, paths: list[str], is_saved: bool = False
) -> dict[str, nn.Module]:
    """Return the layers at `paths` without the excluded ones, after checking that each can be adapted.

    Args:
        module_index: the model's modules.
        config: the configuration.
        paths: what `target_paths` returned for this configuration.
        is_saved: True for a saved adapter: a layer that the model never calls is then a warning, no error.

    Returns:
        {path: layer}; the wrapper in place of a layer that has one.

    Raises:
        TargetError: no layer is left, and `target_modules` is not NO_TARGETS, or a layer cannot be adapted.
    """
    saved = {path for path in module_index.modules if named(path, config.modules_to_save)}
    targets = {
        path: module_index.modules[path]
        for path in without_excluded(paths, config)
        if not (saved and is_within(path, saved))
    }
    if not targets and not parameter_names(config) and config.target_modules != NO_TARGETS:
        raise NoMatchingPeftModuleError(_nothing_matched(module_index.modules, paths, config))
    if not targets and config.target_modules and config.target_modules != NO_TARGETS:
        message = _nothing_matched(module_index.modules, paths, config)
        warnings.warn(f"{message}; only target_parameters have an effect", RuntimeWarning, stacklevel=2)
    for path, layer in targets.items():
        _check_kind(path, layer)
    _check_called(module_index, targets, is_saved)
    return targets


def without_excluded(paths: Iterable[str], config: TunerConfig) -> list[str]:
    """Return the paths that `exclude_modules` and `layers_to_transform` leave.

    Args:
        paths: what `target_paths` returned for this configuration.
        config: the configuration.
    """
    return [path for path in paths if not named(path, config.exclude_modules) and _in_chosen_block(path, config)]


def matches_targets(config: TunerConfig, path: str) -> bool:
    """Return True if the configuration's names, exclusions and chosen blocks select a path.

    Args:
        config: the configuration.
        path: the path of a module.
    """
    return (
        named(path, config.target_modules)
        and not named(path, config.exclude_modules)
        and _in_chosen_block(path, config)
    )


def is_within(path: str, roots: Collection[str]) -> bool:
    """Return True if `path` is one of `roots` or inside of one."""
    while path not in roots:
        path, dot, _ = path.rpartition(".")
        if not dot:
            return False
    return True


def parameter_names(config: TunerConfig) -> list[str]:
    """Return the configuration's `target_parameters`; [] if the option is not set or the method does not have it."""
    return config.target_parameters or []


def find_parameters(module_index: ModuleIndex, config: TunerConfig) -> dict[str, tuple[nn.Module, str]]:
    """Return the raw parameters that `target_parameters` matches.

    Args:
        module_index: the model's modules.
        config: the configuration.

    Returns:
        {path: (module, name of the parameter)}

    Raises:
        TargetError: a name matches no parameter, one of the model itself, or one of a layer that has adapters or is
            quantised. If no name matches and `target_modules` are given, too, a RuntimeWarning says so in place.
    """
    names = parameter_names(config)
    if not names:
        return {}
    if own := [name for name in module_index.model._parameters if named(name, names)]:
        raise TargetError(
            f"target_parameters: {own[0]!r} is a parameter of the model itself, and only those of modules inside of it "
            f"can be adapted; move it into a submodule of {type(module_index.model).__name__}, or leave the name out"
        )
    owners = {path: unwrapped(module) for path, module in module_index.modules.items()}
    every = {f"{p}.{name}": (m, name) for p, m in owners.items() for name, q in m._parameters.items() if q is not None}
    matches = {path: match for path, match in every.items() if named(path, names)}
    for name in names:
        if any(named(path, [name]) for path in matches):
            continue
        _check_not_parametrised(name, owners)
        message = f"target_parameters: {name!r} is no parameter{suggestion(name, list(every))}"
        if matches or not config.target_modules:
            raise TargetError(message)
        warnings.warn(f"{message}; only target_modules have an effect", RuntimeWarning, stacklevel=2)
    for path, (module, _) in matches.items():
        owner = path.rpartition(".")[0]
        if isinstance(module_index.modules[owner], AdapterLayer):
            raise TargetError(f"target_parameters: the layer {owner} has adapters; name it in target_modules in place")
        if is_adaptable(module) and base_weight(module, owner).quantized:
            raise TargetError(
                f"target_parameters: {path} is quantised; name the layer in target_modules in place of it"
            )
    return matches


def _check_not_parametrised(name: str, owners: Mapping[str, nn.Module]) -> None:
    """Raise TargetError if a name of `target_parameters` is that of a tensor which a parametrisation computes."""
    for path, module in owners.items():
        computed = getattr(module, "parametrizations", {}) if is_parametrized(module) else {}
        if any(named(f"{path}.{own}", [name]) for own in computed):
            raise TargetError(
                f"target_parameters: {name!r} is computed by a parametrisation of {path}, so it is no raw parameter; "
                "name the layer in target_modules in place of it"
            )


def says_untied(model: nn.Module) -> bool:
    """Return True if a transformers model's configuration has `tie_word_embeddings=False`."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "tie_word_embeddings", None) is False


def tied_weights(module_index: ModuleIndex) -> list[list[str]]:
    """Return the paths of the layers that share a weight, for each weight of several layers."""
    layers: dict[int, dict[int, str]] = {}
    for path, module in module_index.modules.items():
        layer = unwrapped(module)
        if (weight := layer._parameters.get("weight")) is not None:
            layers.setdefault(id(weight), {}).setdefault(id(layer), path)
    return [list(paths.values()) for paths in layers.values() if len(paths) > 1]


def tied_paths(module_index: ModuleIndex, paths: Iterable[str]) -> dict[str, str]:
    """Return {path of a layer outside of `paths`: the path in `paths` whose weight it shares}."""
    modules = {path: unwrapped(module) for path, module in module_index.modules.items()}
    weights = {id(w): path for path in paths if (w := modules[path]._parameters.get("weight")) is not None}
    sharing = ((path, weights.get(id(module._parameters.get("weight")))) for path, module in modules.items())
    known = set(weights.values())
    return {path: other for path, other in sharing if other is not None and path not in known}


def target_paths(module_index: ModuleIndex, config: TunerConfig) -> list[str]:
    """Return the paths that `target_modules` matches, before exclusions; the defaults if it is None.

    Args:
        module_index: the model's modules.
        config: the configuration.

    Raises:
        TargetError: no default targets are known for this model.
    """
    model, modules = module_index.model, module_index.modules
    config = _with_given_targets(model, config)
    if config.target_modules == ALL_LINEAR:
        return _all_linear(module_index, config)
    if config.target_modules is None and parameter_names(config):
        return []
    if config.target_modules is None:
        layers = {path: m.base_layer if isinstance(m, AdapterLayer) else m for path, m in modules.items()}
        if (defaults := method_of(config).adapter.default_targets(config, model, layers)) is not None:
            return _all_linear(module_index, config) if defaults == ALL_LINEAR else defaults
        architecture = detect(model)
        if not (names := architecture.targets_for(config.peft_type)):
            raise TargetError(
                f"no default target modules are known for {config.method} in {architecture.family}; give "
                f"target_modules, such as {ALL_LINEAR!r} or names among {_linear_names(modules)}"
            )
        if all(
            name in architecture.target_modules and architecture.target_modules[name].role == "unknown"
            for name in names
        ):
            raise TargetError(
                f"no attention or feed-forward layers were found in this {architecture.family}, so its inner "
                f"layers cannot be told from its head; give target_modules, names among {_linear_names(modules)}, or "
                f"{ALL_LINEAR!r} for all of them"
            )
        regex = architecture.target_regex(names)  # it may match an identity in blocks that lack the layer
        return [path for path, layer in layers.items() if named(path, regex) and is_adaptable(layer)]
    names = config.target_modules
    names = names if isinstance(names, str) else frozenset(names)
    return [path for path in modules if named(path, names)]


def _with_given_targets(model: nn.Module, config: TunerConfig) -> TunerConfig:
    """Return a copy with the targets that a program has set for this type of model, if the configuration names none."""
    given = GIVEN_TARGETS.get(config.peft_type)
    if not given or config.target_modules is not None or parameter_names(config):
        return config
    targets = given.get(model_type_of(model))
    if targets is None:
        return config
    return dataclasses.replace(config, target_modules=targets if isinstance(targets, str) else set(targets))


def _all_linear(module_index: ModuleIndex, config: TunerConfig) -> list[str]:
    """Return the paths of all linear layers, except the model's head and the heads of the configuration's task."""
    heads = _heads(module_index, config)
    output = getattr(module_index.model, "get_output_embeddings", lambda: None)()
    return [
        path
        for path, module in module_index.modules.items()
        if _is_linear(module)
        and module is not output
        and not named(path, heads)
        and calls_layer(module_index.parent(path), path.rpartition(".")[2])
    ]


def _is_linear(module: nn.Module) -> bool:
    layer = module.base_layer if isinstance(module, AdapterLayer) else module
    return is_adaptable(layer) and base_weight(layer).kind == "linear"


def _linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if _is_linear(module)})


def _in_chosen_block(path: str, config: TunerConfig) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:  # HF PEFT's files may hold an empty list
        return True
    names = config.target_modules
    if names and not isinstance(names, str) and path in names:  # as in HF PEFT, a whole path is never left out
        return True
    patterns = config.layers_pattern or r"[^.]+"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = [chosen] if isinstance(chosen, int) else chosen
    matches = (matched(pattern, path, *BLOCK) for pattern in patterns)
    first = next((match for match in matches if match), None)
    return first is not None and int(first["block_number"]) in numbers


def _check_kind(path: str, layer: nn.Module) -> None:
    if isinstance(layer, SavedModule):
        raise TargetError(f"{path} is already trained in full as one of modules_to_save; exclude it")
    if isinstance(layer, AdapterParameters) and is_adaptable(layer.base_layer):
        raise TargetError(f"{path}: an adapter on its parameter is in place (target_parameters); exclude this layer")
    if not isinstance(layer, AdapterLayer) and not raw_projections(unwrapped(layer)):
        base_weight(layer, path)


def _check_called(module_index: ModuleIndex, targets: Iterable[str], is_saved: bool) -> None:
    """Raise TargetError, or warn of a saved adapter, if the model reads the weight of a target and never calls it.

    Warn of targets that a fused kernel may skip in training.
    """
    skipped = set()
    for path in targets:
        owner, name = module_index.parent(path), path.rpartition(".")[2]
        if calls_layer(owner, name):
            if kernel_reads(owner, name):
                skipped.add(name)
            continue
        message = f"{path} belongs to {type(owner).__name__}, whose forward reads the weight and never calls the layer"
        if not is_saved:
            raise TargetError(
                f"{message}, so an adapter there would do nothing; exclude it, or name an nn.MultiheadAttention itself"
            )
        warnings.warn(f"{message}, so the adapter there has no effect before it is merged", stacklevel=2)
    if skipped:
        warnings.warn(
            f"in training, a fused kernel may read the weights of {' and '.join(sorted(skipped))} in place of calling "
            "the layers, and adapters there would not be trained; load the model with use_kernels=False and without "
            "the package mamba-ssm, or exclude them",
            stacklevel=2,
        )


def _nothing_matched(modules: Mapping[str, nn.Module], paths: list[str], config: TunerConfig) -> str:
    names = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    if paths:
        excluded = config.exclude_modules
        options = {
            "exclude_modules": sorted(excluded) if isinstance(excluded, Set) else excluded,
            "modules_to_save": config.modules_to_save,
            "layers_to_transform": config.layers_to_transform,
        }
        given = [f"{option}={value!r}" for option, value in options.items() if value not in (None, [])]
        return (
            f"target_modules {names!r} matched {len(paths)} layers, but {' and '.join(given)} "
            f"exclude{'' if len(given) > 1 else 's'} all of them; remove {'one' if len(given) > 1 else 'it'}"
        )
    word = names if isinstance(names, str) else (names[0] if names else "")
    known = [*_linear_names(modules), *([ALL_LINEAR] if isinstance(names, str) else [])]
    return f"target_modules {names!r} match no layer of this model{suggestion(word, known)}"


def find_saved_modules(module_index: ModuleIndex, config: TunerConfig | PromptLearningConfig) -> dict[str, nn.Module]:
    """Return the modules that `modules_to_save` matches.

    Args:
        module_index: the model's modules.
        config: a configuration with the heads of its task filled in; see `with_heads`.

    Returns:
        {path: module}

    Raises:
        TargetError: nothing matches, or a match has adapters inside.
    """
    matches = {path: module for path, module in module_index.modules.items() if named(path, config.modules_to_save)}
    if config.modules_to_save and not matches:
        raise TargetError(
            f"modules_to_save {config.modules_to_save!r} match no module"
            f"{suggestion(config.modules_to_save[0], [p.rsplit('.', 1)[-1] for p in module_index.modules])}"
        )
    wrappers = [
        path for path, m in module_index.modules.items() if m is not unwrapped(m) and not isinstance(m, SavedModule)
    ]
    if adapted := [path for path in matches if any(is_within(wrapper, {path}) for wrapper in wrappers)]:
        raise TargetError(f"modules_to_save {adapted} already have an adapter; target them or save them, not both")
    return matches


def complete(module_index: ModuleIndex, config: TunerConfig) -> tuple[TunerConfig, list[str]]:
    """Fill in the options that depend on the model, so that readers of the saved file need no architecture table.

    Default targets and "all-linear" are replaced by names. A long list of paths is replaced by names if fewer names
    match the same layers. `modules_to_save` gets the heads of the task, and the method may fill in options of its own.

    Args:
        module_index: the model's modules.
        config: the user's configuration; stays as it is.

    Returns:
        (the completed copy, the paths that its `target_modules` match)

    Raises:
        TargetError: no default targets are known for this model.
    """
    config, original = _with_given_targets(module_index.model, config), config
    paths, filled = target_paths(module_index, config), with_heads(module_index, config)
    if paths and (config.target_modules is None or config.target_modules == ALL_LINEAR):
        filled = dataclasses.replace(filled, target_modules=shortest_names(paths, module_index.modules))
    elif _is_long_list(config):
        names = shortest_names(paths, module_index.modules)
        if len(names) < len(config.target_modules or ()):
            filled = dataclasses.replace(filled, target_modules=names)
    filled = method_of(config).adapter.completed(filled, module_index.model, paths)
    if filled.target_modules != original.target_modules:  # the names may match more than the paths
        paths = target_paths(module_index, filled)
    return filled, paths


def _is_long_list(config: TunerConfig) -> bool:
    """Return True if `target_modules` lists so many paths that names are shorter.

    IA3's `feedforward_modules` must be among the listed names, so a list with that option beside it stays as it is.
    """
    names = config.target_modules
    if names is None or isinstance(names, str) or getattr(config, "feedforward_modules", None):
        return False
    return len(names) >= MANY_TARGETS


def with_heads(module_index: ModuleIndex, config: C) -> C:
    """Return a copy whose `modules_to_save` includes the heads of the task type.

    Args:
        module_index: the model's modules.
        config: the configuration; returned itself if the model has no such head.
    """
    heads = _heads(module_index, config)
    if not any(named(path, heads) for path in module_index.modules):
        return config
    names = config.modules_to_save or []
    return dataclasses.replace(config, modules_to_save=[*names, *(head for head in heads if head not in names)])


def _heads(module_index: ModuleIndex, config: TunerConfig | PromptLearningConfig) -> list[str]:
    """Return the names of the heads of the configuration's task, without a PRE_CLASSIFIER that it targets."""
    heads = TASK_HEADS.get(config.task_type, []) if isinstance(config.task_type, TaskType) else []
    if "classifier" not in heads:
        return heads
    targets = config.target_modules if isinstance(config, TunerConfig) else None
    targets = None if targets == ALL_LINEAR else targets
    further = (path for path in module_index.modules if named(path, [PRE_CLASSIFIER]))
    return [*heads, PRE_CLASSIFIER] if any(not named(path, targets) for path in further) else heads


def shortest_names(wanted: Collection[str], others: Iterable[str]) -> set[str]:
    """Return the shortest name for each wanted path that names none of the other paths.

    A name is the end of a path, in whole segments: "q_proj" or "self_attn.q_proj". A path that is itself the end of
    another one is returned whole.

    Args:
        wanted: paths of modules.
        others: paths that no name may match; those that are also wanted are left out.
    """
    wanted = set(wanted)
    taken = {end for path in others if path not in wanted for end in _ends(path)}
    return {next((end for end in _ends(path) if end not in taken), path) for path in wanted}


def _ends(path: str) -> list[str]:
    """Return the ends of a path in whole segments, shortest first: "c", "b.c" and "a.b.c" of "a.b.c"."""
    segments = path.split(".")
    return [".".join(segments[start:]) for start in range(len(segments) - 1, -1, -1)]
