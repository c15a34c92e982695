"""Adapters that were saved before transformers renamed modules of the model, or before it fused the experts' layers.

Before transformers 5 each expert was a module with its own layers, such as `experts.3.w1`. Now the layers of all
experts are one parameter, and two layers of an expert may be one matrix: `experts.gate_up_proj` (e, o, i). The LoRAs of
these layers become one LoRA of that parameter, of rank n·r for n layers: A is stacked, and B is block-diagonal.

Shapes: e experts, i in_features, o out_features, r rank.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from peftcore._util.patterns import is_suffix
from peftcore.bases import ParameterWeight, base_weight
from peftcore.config import ALL_LINEAR, PeftConfig, TunerConfig, first_match
from peftcore.errors import CheckpointError, TargetError
from peftcore.files.tensors import PREFIX
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import matches_targets, named
from peftcore.layers.wrapper import unwrapped
from peftcore.storage.adapter_state import AdapterState

C = TypeVar("C", bound=PeftConfig)

_TOKENS = "token_adapter."
"""First part of the keys of single embedding rows, after the embedding's path."""
_OF_LAYERS = (
    *("lora_dropout", "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Options of LoRA that do not fit parameters."""
_STARTS_OF_PARAMETERS = (True, False, "gaussian", "eva")
"""Values of `init_lora_weights` that fit parameters; EVA's data change layers only."""


class _Fusion(NamedTuple):
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


class _Changes(NamedTuple):
    """Changes of a transformers model since older versions."""

    renamings: list[Any]
    fusions: list[_Fusion]

    def renamed(self, key: str) -> str:
        """Return the present name of a key."""
        from transformers.core_model_loading import rename_source_key

        return PREFIX + rename_source_key(key.removeprefix(PREFIX), self.renamings, [])[0]

    def fused(self, path: str) -> tuple[str, int, int] | None:
        """Return the result of the fusion to which a former layer belongs; see `_Fusion.parameter_of`."""
        return next((found for fusion in self.fusions if (found := fusion.parameter_of(path)) is not None), None)


def _changes(model: Any) -> _Changes | None:
    """Return the changes of a model that transformers states; None for other models."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    fusions = [
        _Fusion([_source(pattern) for pattern in step.source_patterns], _target(step.target_patterns[0]))
        for step in steps
        if isinstance(step, WeightConverter)
        and len(step.target_patterns) == 1
        and all(".*." in pattern and pattern.endswith(".weight") for pattern in step.source_patterns)
        and all(isinstance(operation, MergeModulelist | Concatenate) for operation in step.operations)
    ]
    return _Changes([step for step in steps if isinstance(step, WeightRenaming)], fusions)


def _target(pattern: str) -> str:
    return f".{pattern.removeprefix('.')}"


def _source(pattern: str) -> tuple[str, str]:
    before, after = _target(pattern).removesuffix(".weight").split(".*.")
    return before, after


# -- keys of renamed modules -----------------------------------------------------------------------------------------


def under_new_names(tensors: Mapping[str, Tensor], expected: Collection[str], model: Any) -> Mapping[str, Tensor]:
    """Return a directory's tensors under the present names of modules that transformers has renamed since.

    Args:
        tensors: The tensors by key.
        expected: The adapter's keys. Only a key that is not among them is renamed, and only to one of them.
        model: The model; models that are not of transformers have no renamed modules.
    """
    foreign = tensors.keys() - expected
    changes = _changes(model) if foreign else None
    if changes is None:
        return tensors
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in foreign:
            new = changes.renamed(key)
            key = new if new in expected and new not in tensors else key
        renamed[key] = tensor
    return renamed


# -- the configuration -----------------------------------------------------------------------------------------------


def for_present_modules(config: PeftConfig, keys: Iterable[str], model: nn.Module) -> PeftConfig:
    """Return a saved adapter's configuration with the present names of the modules that it adapts.

    Args:
        config: The saved configuration.
        keys: The keys of the saved tensors; they name the modules, as older versions of transformers did.
        model: The model, with or without adapters.

    Returns:
        The configuration; unchanged if no module of the adapter was renamed or fused.

    Raises:
        CheckpointError: Layers that are one parameter now have different scalings.
    """
    changes = _changes(model) if isinstance(config, TunerConfig) else None
    if changes is None:
        return config
    modules, new_of, fused = ModuleIndex(model).modules, {}, {}
    is_older = False
    for key in keys:
        old, old_rest = _module_of(key, modules)
        new, new_rest = _module_of(changes.renamed(key), modules)
        former = _former_layer(changes.renamed(key))
        if former is not None and (place := changes.fused(former)) is not None:
            fused.setdefault(place[0], {})[place[1]] = _former_layer(key)
            is_older = True
        elif len(new_rest) < len(old_rest):
            is_older = True
            new_of[new] = ".".join([part for part in (old, *old_rest[: len(old_rest) - len(new_rest)]) if part])
        elif new and not _is_own(modules[new], new_rest) and not new_rest[0].startswith(_TOKENS.rstrip(".")):
            new_of[new] = new
    return _with_targets(config, modules, new_of, fused) if is_older else config


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
    changes = _changes(model)
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
        rank, scalings = _fused_rank(lora, layers)
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
        ranks[_pattern_key(path)], alphas[_pattern_key(path)] = rank, scalings.pop() * lora.denominator(rank)
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
        if any(weight is None or weight.dim() != 2 or _can_be_adapted(modules[p]) for p, weight in weights.items()):
            kept.append(target)
        else:
            routers += [f"{path}.weight" for path in paths if matches_targets(config, path)]
    return kept, routers


def _fused_rank(config: Any, layers: Iterable[str]) -> tuple[int, set[float]]:
    """Return (rank of one LoRA in place of those of former layers, the scalings of these)."""
    numbers = [config.at(layer) for layer in layers]
    return sum(rank for rank, _ in numbers), {alpha / config.denominator(rank) for rank, alpha in numbers}


def _module_of(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, list[str]]:
    """Return (path of the deepest module on the way to a tensor, the rest of the key in parts)."""
    path, rest = key.removeprefix(PREFIX), []
    while path and path not in modules:
        path, _, part = path.rpartition(".")
        rest.insert(0, part)
    return path, rest


def _former_layer(key: str) -> str | None:
    """Return the path of the layer of a LoRA's tensor; None for other tensors."""
    match = re.fullmatch(r"(.*)\.lora_[AB]\.weight", key.removeprefix(PREFIX))
    return None if match is None else match[1]


def _is_own(module: nn.Module, rest: list[str]) -> bool:
    """Return True if the rest of a key names a tensor of the module itself, not of an adapter."""
    return rest == [] or (rest[-1] in unwrapped(module)._parameters and len(rest) == 1)


def _with_targets(
    config: Any,
    modules: Mapping[str, nn.Module],
    new_of: Mapping[str, str],
    fused: Mapping[str, Mapping[int, str]],
) -> PeftConfig:
    """Return the configuration with full paths as its targets, and with the ranks and scalings of the old paths."""
    layers = [path for path in new_of if _can_be_adapted(modules[path])]
    parameters = {f"{path}.weight": path for path in new_of if path not in layers}
    values: dict[str, Any] = {"target_modules": _exactly(layers, modules), "exclude_modules": None}
    values |= {"layers_to_transform": None, "layers_pattern": None}
    for field in dataclasses.fields(config):
        pattern = getattr(config, field.name)
        if field.name.endswith("_pattern") and isinstance(pattern, dict):
            by_path = {**{path: new_of[path] for path in layers}, **{p: new_of[m] for p, m in parameters.items()}}
            matches = {path: first_match(pattern, old, None) for path, old in by_path.items()}
            values[field.name] = {_pattern_key(path): value for path, value in matches.items() if value is not None}
    for path, sources in fused.items():
        rank, scalings = _fused_rank(config, sources.values())
        if len(scalings) > 1:
            raise CheckpointError(
                f"{path} is one parameter now, and the adapter has different scalings for its parts "
                f"{sorted(sources.values())}; merge the adapter with the version of transformers that trained it"
            )
        values["rank_pattern"][_pattern_key(path)] = rank
        values["alpha_pattern"][_pattern_key(path)] = scalings.pop() * config.denominator(rank)
    if fused or parameters:
        values["target_parameters"] = [*(config.target_parameters or ()), *parameters, *fused]
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} is dropped: the experts' layers are parameters now, whose input "
                "is not seen",
                stacklevel=6,
            )
            values["lora_dropout"] = 0.0
    return dataclasses.replace(config, **values)


def _can_be_adapted(module: nn.Module) -> bool:
    try:
        base_weight(unwrapped(module))
    except TargetError:
        return False
    return True


def _exactly(paths: list[str], modules: Iterable[str]) -> list[str] | str:
    """Return `target_modules` that match these paths only."""
    chosen = set(paths)
    if any(other.endswith(f".{path}") for path in paths for other in modules if other not in chosen):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)


def _pattern_key(path: str) -> str:
    return f"^{re.escape(path)}"


# -- the tensors of experts ------------------------------------------------------------------------------------------


def with_fused_experts(tensors: Mapping[str, Tensor], state: AdapterState, model: Any) -> Mapping[str, Tensor]:
    """Return a directory's tensors with one LoRA per parameter in place of the LoRAs of the experts' former layers.

    Args:
        tensors: The tensors by key.
        state: The adapter that is loaded.
        model: The model.
    """
    targets = {
        adapter.printed[1]: (prefix, adapter, list(own))
        for prefix, adapter, own in state.entries
        if isinstance(adapter.base, ParameterWeight) and not any(f"{prefix}{key}" in tensors for key in own)
    }
    changes = _changes(model) if targets else None
    if changes is None or not changes.fusions:
        return tensors
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for key in tensors:
        former = _former_layer(changes.renamed(key))
        fused = None if former is None else changes.fused(former)
        if fused is not None and fused[0] in targets:
            old = _former_layer(key)
            assert old is not None
            parts.setdefault(fused[0], {})[fused[1], fused[2]] = old
    result = dict(tensors)
    for path, layers in parts.items():
        prefix, adapter, (key_a, key_b, *_) = targets[path]
        count = len(next(f for f in changes.fusions if path.endswith(f.target)).sources)
        sources = sorted({source for source, _ in layers})
        if layers.keys() != {(source, expert) for source in sources for expert in range(adapter.base.count)}:
            continue  # some experts have no LoRA: the missing keys are reported
        names = {part: tuple(f"{PREFIX}{old}.lora_{letter}.weight" for letter in "AB") for part, old in layers.items()}
        if not all(name in tensors for pair in names.values() for name in pair):
            continue
        rows = adapter.base.out_features // count
        factors = [
            [(tensors[names[s, e][0]], tensors[names[s, e][1]], s) for s in sources] for e in range(adapter.base.count)
        ]
        result[f"{prefix}{key_a}"] = torch.cat([a for expert in factors for a, _, _ in expert])
        b = torch.stack([_block_diagonal(expert, rows, count) for expert in factors], 2)
        result[f"{prefix}{key_b}"] = b.flatten(1)
        for pair in names.values():
            for name in pair:
                del result[name]
    return result


def _block_diagonal(factors: list[tuple[Tensor, Tensor, int]], rows: int, count: int) -> Tensor:
    """Return B (count·rows, sum of the ranks) of one expert; B of each source changes the rows of its source only."""
    ranks = [b.shape[1] for _, b, _ in factors]
    result = factors[0][1].new_zeros(count * rows, sum(ranks))
    column = 0
    for (_, b, source), rank in zip(factors, ranks, strict=True):
        result[source * rows : (source + 1) * rows, column : column + rank] = b
        column += rank
    return result
