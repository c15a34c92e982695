"""`peft.tuners.lora.arrow`: a model whose tokens are routed to trained LoRAs.

`peftcore.methods.lora.variants.arrow` is the router of one layer.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftcore.adapter import Adapter
from peftcore.errors import ConfigError, LayerKindError
from peftcore.hf_peft.reexports import reexported
from peftcore.injection.adapter_set import ATTRIBUTE, adapter_set
from peftcore.injection.module_index import ModuleIndex
from peftcore.injection.targets import target_paths
from peftcore.methods.lora import Lora, LoraConfig
from peftcore.methods.lora.variants.arrow import ArrowConfig, routed_factors
from peftcore.model import PeftModel

__all__ = ["GKS_ADAPTER_PREFIX", "TASK_ADAPTER_PREFIX", "create_arrow_model"]

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
_ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Load trained LoRAs into a model, and add a router that weights them for each token (Arrow).

    The LoRAs are loaded as "task_0", "task_1", ... and the general ones as "gks_0", ...; the active adapter is the
    router, "arrow_router". LoRAs that are loaded or deleted later change what the router chooses from. On an error the
    base model stays as it was.

    Args:
        base_model: the base model; changed in place.
        task_specific_adapter_paths: directories or hub ids of the LoRAs, such as "user/repository/folder".
        arrow_config: the options. `task_adapter_names` and `gks_adapter_names` are set in it.
        general_adapter_paths: LoRAs whose mean is subtracted from each of the others, if `use_gks` is True.
        adapter_kwargs: further arguments of `PeftModel.from_pretrained` and `load_adapter`.

    Returns:
        The model, as a `PeftModel`.

    Raises:
        ConfigError: there is no LoRA, an adapter is no plain LoRA, or the LoRAs differ in layers, ranks or shapes.
        LayerKindError: a LoRA adapts layers that are not linear; also a TypeError.
        CheckpointError: a LoRA is not found, is damaged, or was made for another base model.
    """
    has_dtype = adapter_kwargs.pop("dtype", None) is not None
    _check_arguments(base_model, task_specific_adapter_paths, arrow_config, general_adapter_paths, has_dtype)
    general = general_adapter_paths if arrow_config.use_gks and general_adapter_paths else ()
    names = [f"{TASK_ADAPTER_PREFIX}{number}" for number in range(len(task_specific_adapter_paths))]
    general_names = [f"{GKS_ADAPTER_PREFIX}{number}" for number in range(len(general))]
    sources = dict(zip([*names, *general_names], [*task_specific_adapter_paths, *general], strict=True))
    trains = {name: parameter.requires_grad for name, parameter in base_model.named_parameters()}
    modes = {module: module.training for module in base_model.modules()}
    model: Any = None
    try:
        for name, source in sources.items():
            directory, subfolder = _resolve_adapter_source(source)
            options = {**({} if subfolder is None else {"subfolder": subfolder}), **adapter_kwargs}
            if model is None:
                model = PeftModel.from_pretrained(base_model, directory, adapter_name=name, **options)
            else:
                model.load_adapter(directory, adapter_name=name, **options)
        options = ArrowConfig.made_from(
            {**arrow_config, "task_adapter_names": names, "gks_adapter_names": general_names}, "arrow_config"
        )
        model.add_adapter(_ROUTER, _router_config(model, [*sources], options))
    except Exception:
        if model is not None:
            plain = model.unload()
            for name, parameter in plain.named_parameters():
                parameter.requires_grad = trains[name]
            for module, training in modes.items():
                module.training = training
        raise
    arrow_config.update(options)
    model.set_adapter(_ROUTER)
    return model


def _check_arguments(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None,
    has_dtype: bool,
) -> None:
    """Raise ConfigError for arguments of `create_arrow_model` that do not fit; warn of those without effect."""
    if not task_specific_adapter_paths:
        raise ConfigError("create_arrow_model: task_specific_adapter_paths is empty; give at least one LoRA")
    if ATTRIBUTE in vars(base_model):
        raise ConfigError(
            "create_arrow_model: the model has adapters already; give the base model (unload() returns it), or add a "
            "router to these adapters: add_adapter('router', LoraConfig(arrow_config=ArrowConfig()))"
        )
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("create_arrow_model: use_gks=True needs LoRAs to subtract; give general_adapter_paths")
    if general_adapter_paths and not arrow_config.use_gks:
        warnings.warn("create_arrow_model: general_adapter_paths has no effect without use_gks=True", stacklevel=3)
    if has_dtype:
        warnings.warn(
            "create_arrow_model: dtype has no effect; autocast_adapter_dtype=False gives adapters the dtype of their "
            "layers",
            stacklevel=3,
        )


def _router_config(model: nn.Module, names: list[str], options: Any) -> LoraConfig:
    """Return the router's configuration, after a check that the LoRAs of these names fit together."""
    adapters = adapter_set(model)
    first, *others = names
    shapes = {name: _shapes(name, adapters.of_method(name)) for name in names}
    for name in others:
        if shapes[name].keys() != shapes[first].keys():
            only = min(shapes[name].keys() ^ shapes[first].keys())
            raise ConfigError(
                f"create_arrow_model: target_modules mismatch: only one of {first!r} and {name!r} adapts {only}; give "
                "LoRAs of the same layers"
            )
        if different := [path for path, shape in shapes[name].items() if shape != shapes[first][path]]:
            path = different[0]
            raise ConfigError(
                f"create_arrow_model: rank mismatch at {path}: {name!r} has A and B of {shapes[name][path]}, {first!r} "
                f"of {shapes[first][path]}; give LoRAs of one rank"
            )
    paths = list(shapes[first])
    ends = sorted({path.rpartition(".")[2] for path in paths})
    rank = shapes[first][paths[-1]][0][0]
    config = LoraConfig(arrow_config=options, target_modules=ends, r=rank)
    if {*target_paths(ModuleIndex(model), config)} != {*paths}:
        config = LoraConfig(arrow_config=options, target_modules=sorted(paths), r=rank)
    return config


def _shapes(name: str, adapters: Mapping[str, Adapter]) -> dict[str, list[tuple[int, ...]]]:
    """Return {path: shapes of A and B} of a LoRA, after a check that Arrow can route to it."""
    for path, lora in adapters.items():
        if not isinstance(lora, Lora):
            raise ConfigError(f"create_arrow_model: {name!r} is no LoRA, but {type(lora).__name__}; give LoRAs")
        if lora.base.kind != "linear":
            raise LayerKindError(
                f"create_arrow_model: Arrow routes LoRAs of linear layers; {name!r} adapts {path}, which is "
                f"{type(lora.base.layer).__name__}; give LoRAs of linear layers only"
            )
        if routed_factors(lora) is None:
            raise ConfigError(f"create_arrow_model: {name!r} at {path} is a variant of LoRA; give plain LoRAs")
    return {path: [tuple(factor.shape) for factor in lora.own_factors()] for path, lora in adapters.items()}  # type: ignore[attr-defined]


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """Return the directory or hub id of a LoRA, and the folder in the repository of a hub id with more than two parts.

    Raises:
        ConfigError: the directory holds no adapter.
    """
    if Path(path).is_dir():
        if not (Path(path) / "adapter_config.json").is_file():
            raise ConfigError(f"create_arrow_model: {path} holds no adapter_config.json; give the folder of a LoRA")
        return str(path), None
    owner, *rest = str(path).strip("/").split("/")
    return "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None


def __getattr__(name: str) -> Any:
    return reexported(__name__, name)
