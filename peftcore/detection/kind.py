"""Facts of a whole model: its kind, its vocabulary and the layers that give its answer."""

from typing import Any

from torch import nn

from peftcore.detection.module_tree import BlockList, ModuleTree, is_below
from peftcore.detection.roles import Roles
from peftcore.detection.trunk import token_embedding


def model_kind(model: nn.Module, tree: ModuleTree, roles: Roles, blocks: tuple[BlockList, ...]) -> str:
    """ "causal decoder", "encoder", "encoder-decoder", "vision encoder" or "other"."""
    config = getattr(model, "config", None)
    places = [set(block.pattern.split(".")) for block in blocks]
    both = any("encoder" in place for place in places) and any("decoder" in place for place in places)
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
    # attention that is no layer of ours (XLNet, I-BERT) says so in its class
    attends = any(role in ("query", "fused_qkv") for role in roles.values()) or any(
        "attention" in type(module).__name__.lower() for module in tree.modules.values()
    )
    return "encoder" if attends else "other"


def _has_causal_head_only(config: Any) -> bool:
    """Headless models of a family that transformers knows with a causal head and with no masked one (Mamba)."""
    from transformers.models.auto import modeling_auto as auto

    family = getattr(config, "model_type", None)
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING_NAMES
    return family in causal and family not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _embeds_patches(tree: ModuleTree) -> bool:
    convolutions = [
        site.layer
        for site in tree.sites.values()
        if isinstance(site.layer, nn.Conv2d) and tree.block_of(site.path) is None
    ]
    return bool(tree.blocks) and any(layer.kernel_size == layer.stride > (1, 1) for layer in convolutions)


_INPUTS = {"pi0": ("in_proj", "state_proj", "mlp_in", "mlp_out")}
"""{family: ends of names} of layers outside the base model that feed it: π0 turns states and actions into tokens."""


def head_paths(model: nn.Module, tree: ModuleTree) -> list[str]:
    """Layers that give the model's answer: the output embeddings, else a task's layers outside the base model.

    In a module that is no transformers model: a layer with one output per token, else the last one that follows the
    blocks at the top. Without repeated blocks nothing tells a head from any other layer.
    """
    outside = [site for site in tree.linears() if tree.block_of(site.path) is None]
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    found = [site.path for site in outside if head is not None and head in (site.layer, _at(model, site.path))]
    if found:
        return found
    prefix = getattr(model, "base_model_prefix", "")
    if prefix in tree.modules and prefix:
        feeding = _INPUTS.get(str(getattr(getattr(model, "config", None), "model_type", "")), ())
        return [s.path for s in outside if not is_below(s.path, prefix) and not s.path.endswith(tuple(feeding))]
    if prefix:  # a task's class that keeps the parts of its base model at the top
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        return [site.path for site in outside[-1:] if site.out_features == labels and "." not in site.path]
    if not tree.blocks:
        return []
    vocabulary = vocab_size(model, tree)
    per_token = [site.path for site in outside if site.out_features == vocabulary]
    order = list(tree.modules)
    last_block = max(order.index(block) for block in tree.blocks)
    after = [site.path for site in outside if "." not in site.path and order.index(site.path) > last_block]
    return per_token or after[-1:]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module that holds `path`'s place, an adapter's wrapper included."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def vocab_size(model: nn.Module, tree: ModuleTree) -> int | None:
    """Rows of the token embedding: the one the model names, else the largest outside the blocks."""
    named = token_embedding(model, tree)
    if named is not None or hasattr(model, "get_input_embeddings"):
        return tree.sites[named].in_features if named else None
    tables = [s.in_features for s in tree.sites.values() if s.kind == "embedding" and not tree.block_of(s.path)]
    return max(tables, default=None)
