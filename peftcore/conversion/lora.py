"""The configuration and the tensors of a plain LoRA, from the factors of its layers.

Each layer keeps its rank (`rank_pattern`) and its scaling s (`alpha_pattern`, α of the layer = s·r). Layers of rank 0
are not targeted. For a rank that the caller gave, s is 1 in every layer, as in HF PEFT: B contains the scaling.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore.config import PeftConfig
from peftcore.errors import ConfigError
from peftcore.files.tensors import PREFIX
from peftcore.kernels.factors import Factors
from peftcore.methods.lora import LoraConfig


def without_scaling(factors: Factors) -> Factors:
    """Return the same change with the scaling 1; B contains the scaling."""
    return factors if factors.scaling == 1 else factors._replace(b=factors.b * factors.scaling, scaling=1.0)


def lora_config(config: PeftConfig, layers: Mapping[str, Factors], rank: int | float | None = None) -> LoraConfig:
    """Return the configuration of a LoRA that replaces an adapter.

    Args:
        config: the configuration of the adapter.
        layers: {path: factors of the LoRA}; their scaling is 1 if `rank` is given.
        rank: r and lora_alpha (count). A float gives 1 for both, and every layer has its own rank in `rank_pattern`.
            None: the largest rank of the layers.

    Raises:
        ConfigError: every layer has rank 0, or trained biases would have no place.
    """
    source: Any = config
    targets = {path: own for path, own in layers.items() if own.rank}
    if not targets:
        raise ConfigError(
            f"every layer of this {config.method} adapter has rank 0, so no LoRA equals it; there is nothing to save"
        )
    bias = source.bias
    bias = "lora_only" if bias.endswith("_only") else bias
    if bias == "lora_only" and len(targets) < len(layers):
        raise ConfigError(
            f"bias={source.bias!r} has trained biases of layers whose rank fell to 0, which a LoRA without these "
            "layers cannot hold; merge the adapter instead"
        )
    patterns = {path: re.escape(path) for path in targets}
    # a name matches every path that ends with it, so names that would match other paths become regular expressions
    ambiguous = any(other.endswith(f".{path}") for path in targets for other in layers)
    key = {path: f"^{patterns[path]}" if ambiguous else path for path in targets}
    r, alpha = _default(targets, rank)
    ranks = {path: own.rank for path, own in targets.items()}
    alphas = {path: own.scaling * own.rank if rank is None else own.rank for path, own in targets.items()}
    each = isinstance(rank, float)
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        target_modules="|".join(sorted(patterns.values())) if ambiguous else sorted(targets),
        modules_to_save=source.modules_to_save,
        r=r,
        lora_alpha=alpha,
        lora_dropout=getattr(source, "lora_dropout", 0.0),
        bias=bias,
        rank_pattern={key[path]: own for path, own in ranks.items() if each or own != r},
        alpha_pattern={key[path]: own for path, own in alphas.items() if each or own != alpha},
        fan_in_fan_out=getattr(source, "fan_in_fan_out", False),
    )


def _default(targets: Mapping[str, Factors], rank: int | float | None) -> tuple[int, float]:
    """Return r and lora_alpha of a configuration."""
    if rank is not None:
        r = 1 if isinstance(rank, float) else rank
        return r, r
    largest = max(targets.values(), key=lambda own: own.rank)
    return largest.rank, largest.scaling * largest.rank


def lora_tensors(layers: Mapping[str, Factors], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Return {PEFT's key: tensor} of the layers whose rank is not 0.

    `shapes` has (kind of layer, kernel size) by path; a layer without an entry is linear.
    """
    tensors = {}
    for path, own in layers.items():
        kind, kernel = shapes.get(path, ("linear", ()))
        key = f"{PREFIX}{path}.lora_embedding_{{}}" if kind == "embedding" else f"{PREFIX}{path}.lora_{{}}.weight"
        if own.rank:
            tensors[key.format("A")] = own.a.reshape(own.rank, -1, *kernel).contiguous()
            tensors[key.format("B")] = own.b.reshape(-1, own.rank, *(1 for _ in kernel)).contiguous()
    return tensors
