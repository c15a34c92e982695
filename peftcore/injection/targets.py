"""Which layers a configuration means: path suffixes, a regular expression, or "all-linear".

Names match by whole path segments: "head" is `head` and `decoder.head`, never `overhead`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import nn

from peftcore._util.patterns import matched
from peftcore.bases import base_weight, calls_its_layers, is_adaptable, raw_projections
from peftcore.config import BLOCK, PromptLearningConfig, TaskType, TunerConfig
from peftcore.detection import detect
from peftcore.errors import TargetError, suggestion
from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.adapter_layer import AdapterLayer
from peftcore.layers.saved_module import SavedModule
from peftcore.layers.wrapper import unwrapped
from peftcore.registry import method_of

ALL_LINEAR = "all-linear"

C = TypeVar("C", TunerConfig, PromptLearningConfig)

TASK_HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Heads that start untrained, so PEFT trains and saves them with the adapter."""


def named(path: str, names: Collection[str] | None) -> bool:
    """Whether `path` matches: a string is a regular expression over the whole path, others hold path suffixes.

    In a set a name is found in constant time, which counts where every layer is named by its whole path.
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


def find_targets(
    model: nn.Module, config: TunerConfig, module_index: ModuleIndex | None = None
) -> dict[str, nn.Module]:
    """{path: layer} to adapt; a layer that is a wrapper already is given as it is.

    module_index: the model's, where the caller has them.
    Raises TargetError when nothing matches, or when a match cannot be adapted.
    """
    module_index = module_index or ModuleIndex(model)
    wanted = _wanted_paths(module_index, config)
    saved = {path for path in module_index.modules if named(path, config.modules_to_save)}
    targets = {
        path: module_index.modules[path]
        for path in wanted
        if not named(path, config.exclude_modules)
        and not (saved and is_within(path, saved))
        and _in_chosen_block(path, config)
    }
    if not targets and not parameter_names(config):
        raise TargetError(_nothing_matched(module_index.modules, wanted, config))
    for path, layer in targets.items():
        _check_kind(path, layer)
    _check_called(module_index, targets)
    return targets


def is_within(path: str, roots: Collection[str]) -> bool:
    """Whether `path` is one of `roots` or below one."""
    while path not in roots:
        path, dot, _ = path.rpartition(".")
        if not dot:
            return False
    return True


def parameter_names(config: TunerConfig) -> list[str]:
    """The raw parameters that a configuration names, if its method knows such."""
    return config.target_parameters or []


def find_parameters(module_index: ModuleIndex, config: TunerConfig) -> dict[str, tuple[nn.Module, str]]:
    """{path of a raw parameter: (its module, its name)} for `target_parameters`; TargetError for a name of none."""
    names = parameter_names(config)
    if not names:
        return {}
    owners = {path: unwrapped(module) for path, module in module_index.modules.items()}
    every = {f"{p}.{name}": (m, name) for p, m in owners.items() for name, q in m._parameters.items() if q is not None}
    found = {path: place for path, place in every.items() if named(path, names)}
    for name in names:
        if not any(named(path, [name]) for path in found):
            raise TargetError(f"target_parameters: {name!r} is no parameter{suggestion(name, list(every))}")
    if wrapped := [path for path, (m, _) in found.items() if is_adaptable(m)]:
        raise TargetError(f"target_parameters: {wrapped[0]} belongs to a layer; name that layer in target_modules")
    return found


def tied_paths(module_index: ModuleIndex, paths: Iterable[str]) -> dict[str, str]:
    """{path of a layer that is not among `paths`: the one among them whose weight it shares}."""
    modules = {path: unwrapped(module) for path, module in module_index.modules.items()}
    weights = {id(w): path for path in paths if (w := modules[path]._parameters.get("weight")) is not None}
    sharing = ((path, weights.get(id(module._parameters.get("weight")))) for path, module in modules.items())
    known = set(weights.values())
    return {path: other for path, other in sharing if other is not None and path not in known}


def _wanted_paths(module_index: ModuleIndex, config: TunerConfig) -> list[str]:
    model, modules = module_index.model, module_index.modules
    if config.target_modules == ALL_LINEAR:
        heads = TASK_HEADS.get(config.task_type, []) if isinstance(config.task_type, TaskType) else []
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return [
            path
            for path, module in modules.items()
            if _is_linear(module)
            and module is not output
            and not named(path, heads)
            and calls_its_layers(module_index.parent(path))
        ]
    if config.target_modules is None and parameter_names(config):
        return []
    if config.target_modules is None:
        layers = {path: m.base_layer if isinstance(m, AdapterLayer) else m for path, m in modules.items()}
        if (own := method_of(config).adapter.default_targets(config, model, layers)) is not None:
            return own
        architecture = detect(model)
        if not (names := architecture.targets_for(config.peft_type)):
            raise TargetError(
                f"no default target modules are known for {config.peft_type} in {architecture.family}; give "
                f"target_modules, such as {ALL_LINEAR!r} or names among {_linear_names(modules)}"
            )
        if all(
            name in architecture.target_modules and architecture.target_modules[name].role == "unknown"
            for name in names
        ):
            raise TargetError(
                f"no attention or feed-forward layers were found in this {architecture.family}, so no default "
                f"tells its inner layers from its head; give target_modules, names among {_linear_names(modules)}, or "
                f"{ALL_LINEAR!r} for all of them"
            )
        regex = architecture.target_regex(names)  # where some blocks have a layer, others may have an identity
        return [path for path, layer in layers.items() if named(path, regex) and is_adaptable(layer)]
    names = config.target_modules
    names = names if isinstance(names, str) else frozenset(names)
    return [path for path in modules if named(path, names)]


def _is_linear(module: nn.Module) -> bool:
    layer = module.base_layer if isinstance(module, AdapterLayer) else module
    return is_adaptable(layer) and base_weight(layer).kind == "linear"


def _linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if _is_linear(module)})


def _in_chosen_block(path: str, config: TunerConfig) -> bool:
    chosen = config.layers_to_transform
    if chosen is None:
        return True
    patterns = config.layers_pattern or r"[^.]+"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = [chosen] if isinstance(chosen, int) else chosen
    found = (matched(pattern, path, *BLOCK) for pattern in patterns)
    first = next((match for match in found if match), None)
    return first is not None and int(first["block_number"]) in numbers


def _check_kind(path: str, layer: nn.Module) -> None:
    if isinstance(layer, SavedModule):
        raise TargetError(f"{path} is already trained whole as one of modules_to_save; exclude it")
    if not isinstance(layer, AdapterLayer) and not raw_projections(unwrapped(layer)):
        base_weight(layer, path)


def _check_called(module_index: ModuleIndex, targets: Iterable[str]) -> None:
    for path in {path.rpartition(".")[0]: path for path in targets}.values():  # one of each parent's
        owner = module_index.parent(path)
        if not calls_its_layers(owner):
            raise TargetError(
                f"{path} belongs to {type(owner).__name__}, whose forward reads the weight and never calls the layer, "
                "so an adapter there would do nothing; exclude it, or name an nn.MultiheadAttention itself"
            )


def _nothing_matched(modules: Mapping[str, nn.Module], wanted: list[str], config: TunerConfig) -> str:
    given = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    if wanted:
        return (
            f"target_modules {given!r} matched {len(wanted)} layers, but exclude_modules, modules_to_save or "
            "layers_to_transform left none of them; loosen one"
        )
    names = _linear_names(modules)
    word = given if isinstance(given, str) else (given[0] if given else "")
    return f"target_modules {given!r} match no layer of this model{suggestion(word, names)}"


def find_saved_modules(module_index: ModuleIndex, config: TunerConfig | PromptLearningConfig) -> dict[str, nn.Module]:
    """{path: module} of `modules_to_save` and of the heads that the task type adds; TargetError if none is there."""
    found = {path: module for path, module in module_index.modules.items() if named(path, config.modules_to_save)}
    if config.modules_to_save and not found:
        raise TargetError(
            f"modules_to_save {config.modules_to_save!r} match no module"
            f"{suggestion(config.modules_to_save[0], [p.rsplit('.', 1)[-1] for p in module_index.modules])}"
        )
    wrappers = [
        path for path, m in module_index.modules.items() if m is not unwrapped(m) and not isinstance(m, SavedModule)
    ]
    if adapted := [path for path in found if any(is_within(wrapper, {path}) for wrapper in wrappers)]:
        raise TargetError(f"modules_to_save {adapted} already carry an adapter; target them or save them, not both")
    return found


def completed(model: nn.Module, config: TunerConfig, module_index: ModuleIndex | None = None) -> TunerConfig:
    """A copy with what the model decides written out: default targets, "all-linear" as names, heads to train, and
    what the method itself adds.

    Readers of the saved file (PEFT, vLLM) then need no architecture table. The given configuration stays as it is.
    """
    module_index = module_index or ModuleIndex(model)
    wanted, config = _wanted_paths(module_index, config), with_heads(module_index, config)
    if wanted and (config.target_modules is None or config.target_modules == ALL_LINEAR):
        config = dataclasses.replace(config, target_modules=_shortest_names(wanted, module_index.modules))
    return method_of(config).adapter.completed(config, model, wanted)


def with_heads(module_index: ModuleIndex, config: C) -> C:
    """A copy whose `modules_to_save` names the heads that the task type trains."""
    heads = TASK_HEADS.get(config.task_type, []) if isinstance(config.task_type, TaskType) else []
    if not any(named(path, heads) for path in module_index.modules):
        return config
    given = config.modules_to_save or []
    return dataclasses.replace(config, modules_to_save=[*given, *(head for head in heads if head not in given)])


def _shortest_names(wanted: list[str], paths: Iterable[str]) -> set[str]:
    """Last segments of the wanted paths, or whole paths where a segment also names something unwanted."""
    chosen = set(wanted)
    unwanted = {path.rsplit(".", 1)[-1] for path in paths if path not in chosen}
    last = {path: path.rsplit(".", 1)[-1] for path in chosen}
    return {name if name not in unwanted else path for path, name in last.items()}
