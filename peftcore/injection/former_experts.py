"""Targets that name the former layers of experts: new adapters adapt the parameters that hold them now.

Before transformers 5 each expert was a module with its own layers, such as `experts.3.w1`. Now the layers of all
experts are one parameter, and two layers of an expert may be one matrix: `experts.gate_up_proj` (e, o, i), e experts,
o out_features, i in_features.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn

from peftcore._util.patterns import is_suffix
from peftcore.bases import base_weight
from peftcore.config import ALL_LINEAR, PeftConfig, TunerConfig
from peftcore.errors import TargetError
from peftcore.files.tensors import PREFIX
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import matches_targets, named
from peftcore.layers.wrapper import unwrapped

C = TypeVar("C", bound=PeftConfig)

_OF_LAYERS = (
    *("lora_dropout", "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Options of LoRA that do not fit parameters."""
_STARTS_OF_PARAMETERS = (True, False, "gaussian", "eva")
"""Values of `init_lora_weights` that fit parameters; EVA's data change layers only."""


class Fusion(NamedTuple):
    """Layers of the experts that have become one parameter."""

    sources: list[tuple[str, str]]
    """Parts of a layer's path before and after the expert's number, such as (".experts", "w1"), in the order of the
    parameter's rows."""
    target: str
    """End of the parameter's path, such as ".experts.gate_up_proj"."""

    def parameter_of(self, path: str) -> tuple[str, int, int] | None:
        """Return (path of the parameter, index of the source, expert) of a former layer; None for other layers."""
        for index, (before, after) in enumerate(self.sources):
            if match := re.fullmatch(rf"(.*){re.escape(before)}\.(\d+)\.{re.escape(after)}", path):
                return f"{match[1]}{self.target}", index, int(match[2])
        return None

    def layers_of(self, parameter: str) -> list[str]:
        """Return the former layers of the first expert in a parameter; [] if the parameter is not of this fusion."""
        if not parameter.endswith(self.target):
            return []
        return [f"{parameter.removesuffix(self.target)}{before}.0.{after}" for before, after in self.sources]


class ModelChanges(NamedTuple):
    """Changes of a transformers model since older versions."""

    renamings: list[Any]
    fusions: list[Fusion]

    def renamed(self, key: str) -> str:
        """Return the present name of a key."""
        from transformers.core_model_loading import rename_source_key

        return PREFIX + rename_source_key(key.removeprefix(PREFIX), self.renamings, [])[0]

    def fused(self, path: str) -> tuple[str, int, int] | None:
        """Return the result of the fusion to which a former layer belongs; see `Fusion.parameter_of`."""
        return next((found for fusion in self.fusions if (found := fusion.parameter_of(path)) is not None), None)


def model_changes(model: Any) -> ModelChanges | None:
    """Return the changes of a model that transformers states; None for other models."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    fusions = [
        Fusion([_source(pattern) for pattern in step.source_patterns], _target(step.target_patterns[0]))
        for step in steps
        if isinstance(step, WeightConverter)
        and len(step.target_patterns) == 1
        and all(".*." in pattern and pattern.endswith(".weight") for pattern in step.source_patterns)
        and all(isinstance(operation, MergeModulelist | Concatenate) for operation in step.operations)
    ]
    return ModelChanges([step for step in steps if isinstance(step, WeightRenaming)], fusions)


def _target(pattern: str) -> str:
    return f".{pattern.removeprefix('.')}"


def _source(pattern: str) -> tuple[str, str]:
    before, after = _target(pattern).removesuffix(".weight").split(".*.")
    return before, after


def with_fused_targets(config: C, model: nn.Module) -> C:
    """Return a new LoRA's configuration with parameters in place of the experts' former layers that it names.

    As in HF PEFT, `w1` and `w3` of Mixtral become `gate_up_proj` in `target_parameters`, with the sum of their ranks.
    The router's layer becomes its weight. Targets that also name present layers keep these. "all-linear" and default
    targets stay as they are. If a parameter cannot take the place of the layers, a warning says that the experts are
    left out.

    Args:
        config: The configuration.
        model: The model, with or without adapters.
    """
    if not isinstance(config, TunerConfig) or config.peft_type != "LORA" or config.target_modules in (None, ALL_LINEAR):
        return config
    changes = model_changes(model)
    if changes is None or not changes.fusions:
        return config
    modules, lora = ModuleIndex(model).modules, cast(Any, config)
    is_plain = lora.init_lora_weights in _STARTS_OF_PARAMETERS and not any(getattr(lora, name) for name in _OF_LAYERS)
    fused: list[str] = []
    former: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path in _parameters(modules):
        layers = next((layers for fusion in changes.fusions if (layers := fusion.layers_of(path))), [])
        chosen = [layer for layer in layers if matches_targets(config, layer)]
        if not chosen or named(path, lora.target_parameters):
            continue
        rank, scalings = fused_rank(lora, layers)
        if chosen != layers or len(scalings) > 1 or not is_plain:
            names = [layer.rpartition(".")[2] for layer in layers]
            warnings.warn(
                f"target_modules: the experts are left out. Their layers {names} are one parameter now, {path}; to "
                "adapt it, name all of them with one scaling, in a plain LoRA without dropout",
                stacklevel=3,
            )
            return config
        fused.append(path)
        former += layers
        ranks[pattern_key(path)], alphas[pattern_key(path)] = rank, scalings.pop() * lora.denominator(rank)
    kept, routers = _without_routers(config, modules)
    if not is_plain or not (fused or routers):
        return config
    return dataclasses.replace(
        lora,
        target_modules=kept,
        target_parameters=[*(lora.target_parameters or ()), *fused, *routers],
        rank_pattern=ranks | _without_former(lora.rank_pattern, former, modules),
        alpha_pattern=alphas | _without_former(lora.alpha_pattern, former, modules),
    )


def _without_former(pattern: Mapping[str, Any] | None, former: Collection[str], present: Collection[str]) -> Any:
    """Return a pattern without the keys that match former layers alone, whose values the parameters have now."""
    keys = {key for key in pattern or () if any(is_suffix(key, path) for path in former)}
    gone = {key for key in keys if not any(is_suffix(key, path) for path in present)}
    return {key: value for key, value in (pattern or {}).items() if key not in gone}


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the paths of all parameters of the base."""
    for path, module in modules.items():
        yield from (f"{path}.{name}" for name in unwrapped(module)._parameters)


def _without_routers(config: TunerConfig, modules: Mapping[str, nn.Module]) -> tuple[list[str] | str, list[str]]:
    """Return (targets that name layers, weights of the routers that the other targets name)."""
    targets = config.target_modules
    assert targets is not None
    if isinstance(targets, str):
        return (targets if any(named(path, targets) for path in modules) else []), []
    kept, routers = [], []
    for target in targets:
        paths = [path for path in modules if named(path, [target])]
        weights = {path: unwrapped(modules[path])._parameters.get("weight") for path in paths}
        if any(weight is None or weight.dim() != 2 or can_be_adapted(modules[p]) for p, weight in weights.items()):
            kept.append(target)
        else:
            routers += [f"{path}.weight" for path in paths if matches_targets(config, path)]
    return kept, routers


def fused_rank(config: Any, layers: Iterable[str]) -> tuple[int, set[float]]:
    """Return (rank of one LoRA in place of those of former layers, the scalings of these)."""
    numbers = [config.at(layer) for layer in layers]
    return sum(rank for rank, _ in numbers), {alpha / config.denominator(rank) for rank, alpha in numbers}


def can_be_adapted(module: nn.Module) -> bool:
    """Return True if adapters fit a module's class."""
    try:
        base_weight(unwrapped(module))
    except TargetError:
        return False
    return True


def pattern_key(path: str) -> str:
    """Return the key of a `rank_pattern` or `alpha_pattern` that matches one path."""
    return f"^{re.escape(path)}"


# -- the tensors of experts ------------------------------------------------------------------------------------------
