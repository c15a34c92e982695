"""The configuration and the tensors of a plain LoRA, from the factors of its layers.

Each layer keeps its rank (`rank_pattern`) and its scaling s (`alpha_pattern`, α_layer = s·r); layers of rank 0 are no
targets.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore._util.tensors import PREFIX
from peftcore.config import PeftConfig
from peftcore.conversion.factors import Factors
from peftcore.errors import ConfigError
from peftcore.methods.lora import LoraConfig


def lora_config(config: PeftConfig, layers: Mapping[str, Factors]) -> LoraConfig:
    """Of a LoRA with these factors by path, in place of an adapter with `config`. Raises ConfigError."""
    source: Any = config
    kept = {path: own for path, own in layers.items() if own.rank}
    if not kept:
        raise ConfigError(
            f"every layer of this {config.peft_type} adapter has rank 0, so no LoRA equals it; there is nothing to save"
        )
    bias = getattr(source, "bias", "none")
    bias = "lora_only" if bias.endswith("_only") else bias
    if bias == "lora_only" and len(kept) < len(layers):
        raise ConfigError(
            f"bias={source.bias!r} has trained biases of layers whose rank fell to 0, which a LoRA without these "
            "layers cannot hold; merge the adapter instead"
        )
    names = {path: re.escape(path) for path in kept}
    # A name means every path that it ends, so where one path ends another they are written as regular expressions.
    ambiguous = any(other.endswith(f".{path}") for path in kept for other in layers)
    key = {path: f"^{names[path]}" if ambiguous else path for path in kept}
    most = max(own.rank for own in kept.values())
    scaling = next(own.scaling for own in kept.values() if own.rank == most)
    alphas = {path: own.scaling * own.rank for path, own in kept.items()}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        target_modules="|".join(sorted(names.values())) if ambiguous else sorted(kept),
        modules_to_save=source.modules_to_save,
        r=most,
        lora_alpha=scaling * most,
        lora_dropout=getattr(source, "lora_dropout", 0.0),
        bias=bias,
        rank_pattern={key[path]: own.rank for path, own in kept.items() if own.rank != most},
        alpha_pattern={key[path]: alpha for path, alpha in alphas.items() if alpha != scaling * most},
        fan_in_fan_out=getattr(source, "fan_in_fan_out", False),
    )


def lora_tensors(layers: Mapping[str, Factors], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of the layers that have a rank. shapes: {path: (kind of layer, kernel)}."""
    tensors = {}
    for path, own in layers.items():
        kind, kernel = shapes.get(path, ("linear", ()))
        key = f"{PREFIX}{path}.lora_embedding_{{}}" if kind == "embedding" else f"{PREFIX}{path}.lora_{{}}.weight"
        if own.rank:
            tensors[key.format("A")] = own.a.reshape(own.rank, -1, *kernel).contiguous()
            tensors[key.format("B")] = own.b.reshape(-1, own.rank, *(1 for _ in kernel)).contiguous()
    return tensors
