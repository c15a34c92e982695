"""Exchange of a loaded LoRA for a saved one, in the same memory: compiled code then need not be compiled again.

`prepare_model_for_compiled_hotswap` makes room for the largest rank and keeps scalings as tensors. Call it before
`torch.compile`; without `torch.compile` it is not needed. `hotswap_adapter` then exchanges weights and scalings.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftcore.config import PeftConfig
from peftcore.errors import AdapterNameError, ConfigError, HotswapError, suggestion
from peftcore.files import hub
from peftcore.files.tensors import is_sharded, read_tensors
from peftcore.injection.adapter_set import AdapterSet, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.methods.lora import Lora, LoraConfig, is_lora
from peftcore.methods.lora.hotswap import check_rank, clear, enlarge, exchange, rank_of, use_tensor_scaling
from peftcore.storage.adapter_state import AdapterState, adapter_state_of
from peftcore.storage.checkpoint import renamed_since
from peftcore.storage.embedding_rows import EmbeddingLoader
from peftcore.storage.older_models import under_new_names, with_fused_experts
from peftcore.storage.reading import Reading
from peftcore.storage.state_dict import with_prefix

SAME_OPTIONS = (
    "use_rslora",
    "lora_dropout",
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
    "use_qalora",
    "qalora_group_size",
)
"""Options that both configurations must agree on."""
PREFIX = "lora_"
"""The start of the names of LoRA's parameters."""


# -- before torch.compile --------------------------------------------------------------------------------------------


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare LoRAs for an exchange that does not make `torch.compile` compile again.

    Scalings become tensors, and each layer gets rank `target_rank`, with zeros for the further components. The
    outputs stay the same. Call this after the first adapter is loaded and before `torch.compile`.

    Args:
        model: a model with LoRAs; changed in place.
        target_rank: largest rank of all adapters that will be loaded; None leaves the ranks as they are.
        config: configurations whose `r` and `rank_pattern` are set to `target_rank`, for adapters that are added later;
            `model.peft_config`, for example. Configurations of other methods in the mapping stay as they are.
        check_compiled: "error", "warn" or "ignore" a model that is compiled already.

    Raises:
        HotswapError: the model has no LoRA, is compiled already, or a layer cannot have this rank; or `config` is of
            another method.
        AdapterNameError: the model has no adapters.
    """
    if config is not None and not is_lora(config) and not isinstance(config, Mapping):
        raise HotswapError(
            "config must be a LoraConfig, or a mapping {name: configuration} such as model.peft_config; got "
            f"{type(config).__name__}"
        )
    _check_not_compiled(model, check_compiled)
    model = _plain(model)
    adapters = adapter_set(model)
    by_name = {name: _loras(adapters, name) for name, kind in adapters.kinds.items() if kind is Lora}
    if not any(by_name.values()):
        raise HotswapError(
            "the model has no LoRA; load the first adapter before prepare_model_for_compiled_hotswap is called"
        )
    if target_rank is not None:
        if not isinstance(target_rank, int) or isinstance(target_rank, bool) or target_rank < 1:
            raise HotswapError(f"target_rank must be a positive integer or None; got {target_rank!r:.200}")
        for loras in by_name.values():
            for path, lora in loras.items():
                check_rank(lora, target_rank, path)
    elif config:
        warnings.warn("config has no effect without target_rank; give the largest rank", stacklevel=2)
    for name, loras in by_name.items():
        alphas = {path: lora.config.at(path) for path, lora in loras.items()}
        for lora in loras.values():
            use_tensor_scaling(lora)
            if target_rank is not None:
                enlarge(lora, target_rank)
        _set_config(adapters, name, {path: (alpha, rank) for path, (rank, alpha) in alphas.items()})
    if target_rank is not None and config:
        for own in [config] if is_lora(config) else config.values():
            if is_lora(own):
                own.r = target_rank
                own.rank_pattern = dict.fromkeys(own.rank_pattern or {}, target_rank)


def _check_not_compiled(model: nn.Module, check_compiled: str) -> None:
    """Raise HotswapError or warn, as `check_compiled` says, if the model is compiled already."""
    if check_compiled not in ("error", "warn", "ignore"):
        raise HotswapError(f"check_compiled must be 'error', 'warn' or 'ignore'; got {check_compiled!r:.200}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = (
            "the model is compiled already, and would be compiled again; call prepare_model_for_compiled_hotswap "
            "before torch.compile"
        )
        if check_compiled == "error":
            raise HotswapError(message)
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=3)


def hotswaps(hotswap: bool | str, *, is_enabled: bool, is_loaded: bool) -> bool:
    """Return True if `load_adapter(hotswap=...)` exchanges a loaded adapter in place of loading a further one.

    Args:
        hotswap: True, False, or "auto": exchange if hot-swapping is enabled and the adapter is loaded.
        is_enabled: whether `enable_peft_hotswap` was called.
        is_loaded: whether the model has an adapter of this name.

    Raises:
        ConfigError: `hotswap` has another value.
        AdapterNameError: `hotswap` is True, and the adapter is not loaded.
    """
    if hotswap is not True and hotswap is not False and hotswap != "auto":
        raise ConfigError(f"load_adapter: hotswap must be True, False or 'auto'; got {hotswap!r:.200}")
    if hotswap is True and not is_loaded:
        raise AdapterNameError(
            "load_adapter: hotswap=True exchanges a loaded adapter, and none has this adapter_name; leave hotswap out "
            "for the first one"
        )
    return is_enabled and is_loaded if hotswap == "auto" else bool(hotswap)


# -- the exchange ----------------------------------------------------------------------------------------------------


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | int | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Exchange a loaded LoRA for a saved one, which gets the same name.

    Layers that the saved adapter leaves out are cleared: they then compute what the base computes. On an error the
    model stays as it was.

    Args:
        model: a model with the LoRA `adapter_name`, or the result of `torch.compile` for such a model.
        model_name_or_path: the saved adapter: a directory, or a hub id such as "owner/name".
        adapter_name: the loaded adapter, whose weights and scalings are overwritten.
        torch_device: the device to which the tensors are read, before each is copied to its layer's device.
        kwargs: options of the download (`revision`, `subfolder`, `token`, `cache_dir` and the others of
            `huggingface_hub.hf_hub_download`), and `key_mapping`: {regular expression: replacement} for the saved keys.

    Raises:
        HotswapError: one of the two is no LoRA, they differ in an option that changes the computation, the saved one
            adapts further layers, or the loaded one is merged.
        AdapterNameError: the adapter is not loaded.
        CheckpointError: the saved adapter is not found, or is damaged.
        TypeError: an option is unknown.
    """
    adapters = adapter_set(_plain(model))
    adapters.require(adapter_name)
    options, others = hub.split_options(kwargs)
    reading = Reading(torch_device=torch_device, key_mapping=others.pop("key_mapping", None))
    if others:
        name = next(iter(others))
        raise TypeError(f"hotswap_adapter() has no option {name!r}{suggestion(name, [*hub.OPTIONS, 'key_mapping'])}")
    config = PeftConfig.from_pretrained(model_name_or_path, **options)
    check_hotswap_configs_compatible(adapters.configs[adapter_name], config)
    directory = hub.adapter_directory(model_name_or_path, **options)
    with hub.naming_download(model_name_or_path):
        tensors = reading.prepared(read_tensors(directory), renamed_since(_plain(model)))
    _exchange(_plain(model), adapter_name, tensors, cast(LoraConfig, config), str(model_name_or_path))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = PREFIX,
) -> None:
    """Exchange the weights of a loaded LoRA for those of a state dict.

    Args:
        model: as in `hotswap_adapter`.
        state_dict: {HF PEFT's key, with or without the adapter's name: tensor}.
        adapter_name: the loaded adapter.
        config: the configuration of the adapter in the state dict.
        parameter_prefix: only "lora_".

    Raises:
        HotswapError: as in `hotswap_adapter`.
        AdapterNameError: the adapter is not loaded.
    """
    if parameter_prefix != PREFIX:
        raise HotswapError(
            f"parameter_prefix must be {PREFIX!r}, because only LoRAs are exchanged; got {parameter_prefix!r:.200}"
        )
    adapters = adapter_set(_plain(model))
    adapters.require(adapter_name)
    check_hotswap_configs_compatible(adapters.configs[adapter_name], config)
    state = adapter_state_of(adapters, adapter_name)
    tensors = {with_prefix(key.removeprefix("_orig_mod."), state): tensor for key, tensor in state_dict.items()}
    _exchange(_plain(model), adapter_name, tensors, config, "the state dict")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check that an adapter can take the place of another one.

    Ranks and α may differ, also in patterns.

    Args:
        config0: the configuration of the loaded adapter.
        config1: the configuration of the adapter that takes its place.

    Raises:
        HotswapError: one of the two is no LoRA, they differ in an option that changes the computation, or one of them
            changes the base.
    """
    for config in (config0, config1):
        if config.peft_type != "LORA":
            raise HotswapError(
                f"only a LORA can take the place of a LORA without loading it anew; got {config0.method} and "
                f"{config1.method}; use delete_adapter and load_adapter"
            )
    old, new = cast(LoraConfig, config0), cast(LoraConfig, config1)
    for name in SAME_OPTIONS:
        values = [_comparable(getattr(config, name)) for config in (old, new)]
        if values[0] != values[1]:
            raise HotswapError(
                f"the loaded adapter has {name}={getattr(old, name)!r:.200} and the other one "
                f"{getattr(new, name)!r:.200}, so one cannot take the place of the other; use delete_adapter and "
                "load_adapter"
            )
    for config in (old, new):
        if config.initialisation().subtracts or config.replaces_base:
            raise HotswapError(
                f"{'kasa_config' if config.kasa_config else f'init_lora_weights={config.init_lora_weights!r}'} changes "
                "the base for one adapter, so no other one can take its place; use delete_adapter and load_adapter"
            )


def _comparable(value: Any) -> Any:
    """Return an option's value such that equal options are equal: without order and None for empty lists."""
    return sorted(map(str, value)) if isinstance(value, list | set | tuple) and value else value or None


def _exchange(model: nn.Module, name: str, tensors: Mapping[str, Tensor], config: LoraConfig, source: str) -> None:
    """Check all tensors, then write them into the adapter."""
    adapters = adapter_set(model)
    if name in adapters.merged:
        raise HotswapError(f"adapter {name!r} is merged into the base; call unmerge_adapter() first")
    if any(is_sharded(parameter) for parameter in adapters.parameters(name)):
        raise HotswapError(f"adapter {name!r} is sharded over processes; use load_adapter")
    state, loras = adapter_state_of(adapters, name), _loras(adapters, name)
    expected = state.tensors()
    tensors = under_new_names(state.with_our_keys(tensors, expected, name), expected.keys(), model)
    tensors = with_fused_experts(tensors, state, model)
    others = {key: tensors[key] for key in tensors.keys() - expected.keys() - state.repeated()}
    # embeddings of the base may be in the directory if they are the model's own
    rows = EmbeddingLoader(lambda: ModuleIndex(model), adapters, name, may_replace=False)
    unexpected = sorted(others and rows.take(state, others, Path(source)))
    if unexpected:
        raise HotswapError(
            f"{source} holds tensors for which the loaded adapter has no place: {', '.join(unexpected[:5])} "
            f"({len(unexpected)} in all); load the adapter that adapts the most layers first"
        )
    cleared = _cleared(state, expected, tensors, set(map(id, loras.values())))
    missing = sorted(key for key in expected.keys() - tensors.keys() - state.optional() if key not in cleared)
    if missing or len(cleared) == len(expected):
        raise HotswapError(f"{source} lacks tensors of the adapter: {', '.join(missing[:5] or sorted(cleared)[:5])}")
    paths = {id(lora): path for path, lora in loras.items()}
    for prefix, adapter, own in state.entries:
        if f"{prefix}{next(iter(own))}" in cleared:
            continue
        parts = {key: tensors[f"{prefix}{key}"] for key in own}
        path = paths.get(id(adapter))
        fits = all(adapter.fits(key, parts[key]) for key in own) if path is None else rank_of(loras[path], parts)
        if not fits:
            shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in parts.items())
            raise HotswapError(f"{source} does not fit the layer {prefix.strip('.')}: {shapes}; it is of another base")
    for prefix, module in state.copies.items():
        wrong = [k for k, t in module.state_dict().items() if tensors[f"{prefix}{k}"].shape != t.shape]
        if wrong:
            raise HotswapError(f"{source}: {prefix}{wrong[0]} has another shape than here; it is of another base")
    _write(adapters, name, state, loras, tensors, config)


def _cleared(
    state: AdapterState, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], loras: set[int]
) -> set[str]:
    """Return the keys of the LoRA layers of which there is no tensor."""
    cleared: set[str] = set()
    for prefix, adapter, own in state.entries:
        keys = {f"{prefix}{key}" for key in own}
        if id(adapter) in loras and keys <= expected.keys() and keys.isdisjoint(tensors):
            cleared |= keys
    return cleared


@torch.no_grad()
def _write(
    adapters: AdapterSet,
    name: str,
    state: AdapterState,
    loras: dict[str, Lora],
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
) -> None:
    """Write checked tensors into the adapter; cannot fail."""
    paths = {id(lora): path for path, lora in loras.items()}
    numbers: dict[str, tuple[float, int]] = {}
    for prefix, adapter, own in state.entries:
        path = paths.get(id(adapter))
        parts = {key: tensors[f"{prefix}{key}"] for key in own if f"{prefix}{key}" in tensors}
        if path is None:
            adapter.load_checkpoint_tensors(parts)
            adapter.mark_changed()
        elif parts:
            rank, alpha = config.at(path)
            exchange(loras[path], parts, alpha, rank)
            numbers[path] = alpha, rank
        else:
            clear(loras[path])
            rank, alpha = loras[path].config.at(path)
            numbers[path] = alpha, rank
    for prefix, module in state.copies.items():
        module.load_state_dict({key: tensors[f"{prefix}{key}"] for key in module.state_dict()})
    _set_config(adapters, name, numbers)
    adapters.selection.forget()


def _set_config(adapters: AdapterSet, name: str, numbers: Mapping[str, tuple[float, int]]) -> None:
    """Give an adapter a configuration with the present rank of each layer and an α that gives the same scaling.

    Args:
        adapters: the adapters of the model.
        name: the adapter.
        numbers: {path: (α, rank)} whose quotient is the scaling of the layer.
    """
    loras = _loras(adapters, name)
    old = cast(LoraConfig, adapters.configs[name])
    ranks = {path: lora.r for path, lora in loras.items()}
    alphas = {
        path: alpha if rank == ranks[path] else alpha * (old.denominator(ranks[path]) / old.denominator(rank))
        for path, (alpha, rank) in numbers.items()
    }
    if all((ranks[path], alphas[path]) == old.at(path) for path in loras):
        return
    r, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    key = _pattern_keys(ranks)
    rank_pattern = {key[path]: rank for path, rank in ranks.items() if rank != r}
    new = dataclasses.replace(
        old,
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern or dict.fromkeys(old.rank_pattern or {}, r),
        alpha_pattern={key[path]: own for path, own in alphas.items() if own != alpha},
    )
    adapters.configs[name] = new
    for path, lora in loras.items():
        vars(lora).update(config=new, printed=(new, path))


def _pattern_keys(paths: Collection[str]) -> dict[str, str]:
    """Return {path: key of a pattern that matches this path only}."""
    suffixes = {path for path in paths if any(other.endswith(f".{path}") for other in paths)}
    return {path: f"^{re.escape(path)}" if path in suffixes else path for path in paths}


def _most_frequent(values: Any) -> Any:
    present = list(values)
    return max(present, key=present.count)


def _loras(adapters: AdapterSet, name: str) -> dict[str, Lora]:
    return cast(dict[str, Lora], adapters.of_method(name))


def _plain(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)
