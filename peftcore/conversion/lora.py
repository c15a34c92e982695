"""The configuration and the tensors of a plain LoRA, from the factors of its layers.

Each layer keeps its rank (`rank_pattern`) and its scaling s (`alpha_pattern`, α of the layer = s·r). Layers of rank 0
are not targeted.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore._util.tensors import PREFIX
from peftcore.config import PeftConfig
from peftcore.errors import ConfigError
from peftcore.kernels.factors import Factors
from peftcore.methods.lora import LoraConfig


def lora_config(config: PeftConfig, layers: Mapping[str, Factors]) -> LoraConfig:
    """Return the configuration of a LoRA with the factors `layers` (by path) that replaces an adapter with `config`.

    Raises:
        ConfigError: every layer has rank 0, or trained biases would have no place.
    """
    source: Any = config
    targets = {path: own for path, own in layers.items() if own.rank}
    if not targets:
        raise ConfigError(
            f"every layer of this {config.peft_type} adapter has rank 0, so no LoRA equals it; there is nothing to save"
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
    largest = max(own.rank for own in targets.values())
    scaling = next(own.scaling for own in targets.values() if own.rank == largest)
    alphas = {path: own.scaling * own.rank for path, own in targets.items()}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        target_modules="|".join(sorted(patterns.values())) if ambiguous else sorted(targets),
        modules_to_save=source.modules_to_save,
        r=largest,
        lora_alpha=scaling * largest,
        lora_dropout=getattr(source, "lora_dropout", 0.0),
        bias=bias,
        rank_pattern={key[path]: own.rank for path, own in targets.items() if own.rank != largest},
        alpha_pattern={key[path]: alpha for path, alpha in alphas.items() if alpha != scaling * largest},
        fan_in_fan_out=getattr(source, "fan_in_fan_out", False),
    )


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
