"""The kind of a model: causal decoder, encoder, encoder-decoder, vision encoder or other.

The configuration decides if it says so; otherwise the model's structure does.
"""

import dataclasses
from typing import Any, cast

from torch import nn

from peftcore.detection.module_tree import BlockList, ModuleTree
from peftcore.detection.roles import Roles
from peftcore.detection.trunk import token_embedding

NO_MODEL_CONFIG = {"model_type": "custom"}
"""The configuration that HF PEFT assumes of a model without one."""


def model_config_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's configuration as a dictionary, `NO_MODEL_CONFIG` if the model has none.

    Args:
        model: a model whose attribute `config` is a configuration of transformers, a dataclass or a dictionary.
    """
    config: Any = getattr(model, "config", NO_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return dataclasses.asdict(cast(Any, config)) if dataclasses.is_dataclass(config) else config


def model_type_of(model: nn.Module) -> str:
    """Return the `model_type` of a model's configuration, "None" if it has none."""
    config: Any = model_config_of(model)
    return str(config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None))


def model_kind(model: nn.Module, tree: ModuleTree, roles: Roles, blocks: tuple[BlockList, ...]) -> str:
    """Return "causal decoder", "encoder", "encoder-decoder", "vision encoder" or "other"."""
    config = getattr(model, "config", None)
    segments = [set(block.pattern.split(".")) for block in blocks]
    both = any("encoder" in each for each in segments) and any("decoder" in each for each in segments)
    if getattr(config, "is_encoder_decoder", both):
        return "encoder-decoder"
    tokens = token_embedding(model, tree) is not None
    pixels = getattr(model, "main_input_name", None) == "pixel_values"
    if pixels and not tokens:
        return "vision encoder"
    generates = getattr(model, "can_generate", None)
    causal = any(getattr(module, "is_causal", False) is True for module in tree.modules.values())
    if causal or (tokens and callable(generates) and generates()) or _has_causal_head_only(config):
        return "causal decoder"
    if not tokens and _embeds_patches(tree):
        return "vision encoder"
    # attention without adaptable layers (XLNet, I-BERT) is recognised by its class name
    attends = any(role in ("query", "fused_qkv") for role in roles.values()) or any(
        "attention" in type(module).__name__.lower() for module in tree.modules.values()
    )
    return "encoder" if attends else "other"


def _has_causal_head_only(config: Any) -> bool:
    """Return True for a family that transformers has with a causal head and without a masked one (Mamba)."""
    from transformers.models.auto import modeling_auto as auto

    family = getattr(config, "model_type", None)
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES
    return family in causal and family not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _embeds_patches(tree: ModuleTree) -> bool:
    """Return True if a convolution outside of the blocks cuts an image into patches."""
    convolutions = [
        layer.module
        for layer in tree.layers.values()
        if isinstance(layer.module, nn.Conv2d) and tree.block_of(layer.path) is None
    ]
    return bool(tree.blocks) and any(layer.kernel_size == layer.stride > (1, 1) for layer in convolutions)
