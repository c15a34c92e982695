"""Geometry of a key/value prefix: the shapes in the cache of each decoder layer, read from its projection layers."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcore.detection.layer_inputs import is_cross_attention
from peftcore.detection.module_tree import AdaptableLayer, BlockList, ModuleTree, walk
from peftcore.detection.roles import ATTENTION, Role, Roles
from peftcore.detection.trunk import STATE, family_prefix, text_config

_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
"""Attributes of transformers' attention modules for the size of a head."""


@dataclass(frozen=True)
class LayerCache:
    """Shape of the keys and values that one layer caches for one token."""

    kv_heads: int
    head_dim: int
    """Size of one key."""
    value_dim: int
    """Size of one value; it differs from head_dim in multi-head latent attention."""


@dataclass(frozen=True)
class PrefixGeometry:
    """Shape of a learned prefix. It equals the shape of the decoder's cache, or of the only stack's."""

    num_layers: int
    """Number of cache layers: one for each time that a block is called, including blocks without keys and values."""
    num_attention_heads: int
    """Number of query heads of the widest layer."""
    num_kv_heads: int
    """Number of key/value heads of the widest layer, which is HF PEFT's prefix size."""
    head_dim: int
    """Size of a key in the widest layer."""
    token_dim: int
    """Width of the token embedding, for prompts of virtual tokens."""
    layers: tuple[LayerCache | None, ...]
    """Shape for each layer; None for a layer that shares another layer's cache or has no self-attention."""
    shared: tuple[int, ...]
    """Indices of layers that read the keys and values of an earlier layer."""

    @property
    def kv_dim(self) -> int:
        """Width of one layer's keys for one token, heads times head_dim; HF PEFT's `token_dim` of a prefix."""
        return self.num_kv_heads * self.head_dim

    @property
    def uniform(self) -> bool:
        """True if all layers have one shape, and keys have the size of values."""
        shapes = set(self.layers)
        return len(shapes) == 1 and all(shape and shape.head_dim == shape.value_dim for shape in shapes)


@dataclass(frozen=True)
class _Attention:
    """The self-attention of a block: its module, and its projection layers by role, such as "query"."""

    layers: dict[Role, AdaptableLayer]
    module: Any

    def measure(self, config: Any) -> tuple[LayerCache, int]:
        """Return the cache shape of this layer and the number of its query heads."""
        rank, query_width = getattr(self.module, "kv_lora_rank", None), self._query_width()
        if rank and hasattr(self.module, "v_head_dim"):  # latent attention caches the latent and the rotated part
            heads = query_width // int(self.module.v_head_dim)
            return LayerCache(1, int(rank), int(self.module.qk_rope_head_dim)), heads
        head_dim = self._head_dim(config, query_width)
        key_width, value_width = self._kv_widths(query_width, head_dim)
        kv_heads = max(key_width // head_dim, 1)
        return LayerCache(kv_heads, head_dim, value_width // kv_heads), query_width // head_dim

    def _query_width(self) -> int:
        if "output" in self.layers:
            return self.layers["output"].in_features
        if "query" in self.layers:
            return self.layers["query"].out_features
        fused = self.layers.get("fused_qkv")
        return fused.out_features // 3 if fused else self.layers["fused_kv"].out_features // 2

    def _head_dim(self, config: Any, query_width: int) -> int:
        sizes = (getattr(self.module, name, None) for name in _HEAD_SIZES)
        if size := next((size for size in sizes if isinstance(size, int)), None):
            return size
        heads = getattr(self.module, "num_heads", None) or getattr(config, "num_attention_heads", None)
        return getattr(config, "head_dim", None) or (query_width // heads if heads else query_width)

    def _kv_widths(self, query_width: int, head_dim: int) -> tuple[int, int]:
        if "key" in self.layers:
            key = self.layers["key"].out_features
            return key, self.layers["value"].out_features if "value" in self.layers else key
        fused = self.layers.get("fused_qkv")
        both = fused.out_features - query_width if fused else self.layers["fused_kv"].out_features
        return (both, both) if both == head_dim else (both // 2, both // 2)  # one head whose keys are also its values


def find_prefix(
    model: nn.Module, tree: ModuleTree, roles: Roles, trunk: BlockList, token_dim: int
) -> PrefixGeometry | None:
    """Return the prefix geometry of a model.

    Args:
        model: The model.
        tree: Its module tree.
        roles: Roles of its layers.
        trunk: Its main stack.
        token_dim: Width of the token embedding.

    Returns:
        The geometry; None if no layer caches keys and values, or the model's forward accepts no cache.
    """
    if not _takes_cache(tree, trunk.paths[0]):
        return None
    config = text_config(model)
    layer_types = getattr(config, "layer_types", None) or []
    layer_types = list(layer_types) if len(layer_types) == trunk.count else [""] * trunk.count
    by_module = {id(layer.module): layer for layer in tree.layers.values()}
    attentions = [
        None if STATE.search(layer_type) else _attention(tree.modules[path], by_module, roles, family_prefix(config))
        for path, layer_type in zip(trunk.paths, layer_types, strict=True)
    ]
    shared = tuple(i for i, attention in enumerate(attentions) if attention and _reads_another(attention))
    measured = [
        attention.measure(config) if attention and i not in shared else None for i, attention in enumerate(attentions)
    ]
    cached = [each for each in measured if each]
    if not cached:
        return None
    runs = _runs(config, trunk)
    widest, query_heads = max(cached, key=lambda each: each[0].kv_heads * each[0].head_dim)
    return PrefixGeometry(
        num_layers=trunk.count * runs,
        num_attention_heads=query_heads,
        num_kv_heads=widest.kv_heads,
        head_dim=widest.head_dim,
        token_dim=token_dim,
        layers=tuple(each[0] if each else None for each in measured) * runs,
        shared=shared,
    )


def _runs(config: Any, trunk: BlockList) -> int:
    """Return how often a token passes through the blocks with a separate cache each time (HRM); usually 1."""
    slots = getattr(config, "num_hidden_layers", trunk.count)
    looped = not getattr(config, "is_encoder_decoder", False) and slots % trunk.count == 0
    return slots // trunk.count if looped and slots > trunk.count else 1


def _takes_cache(tree: ModuleTree, block: str) -> bool:
    """Return True if the forward of a module around the block accepts a cache."""
    parts = block.split(".")
    around = (tree.modules.get(".".join(parts[:end])) for end in range(len(parts)))
    names = {"cache", "past_key_values"}  # transformers renamed the argument in 5.24
    return any(names & set(inspect.signature(m.forward).parameters) for m in around if m is not None)


def _attention(block: nn.Module, by_module: dict[int, AdaptableLayer], roles: Roles, family: str) -> _Attention | None:
    """Return the self-attention of a block, found by identity, because Zamba's blocks share one attention."""
    modules = dict(walk(block))
    layers: dict[Role, AdaptableLayer] = {}
    module: nn.Module | None = None
    for path, part in modules.items():
        layer = by_module.get(id(part))
        if layer is None or is_cross_attention(path) or roles[layer.path] not in ATTENTION:
            continue
        parts = path.split(".")
        around = [modules[".".join(parts[:end])] for end in range(len(parts))]
        if any(STATE.search(type(m).__name__.removeprefix(family)) for m in around[1:]):
            continue
        layers.setdefault(roles[layer.path], layer)
        module = module or next((m for m in reversed(around) if any(hasattr(m, n) for n in _HEAD_SIZES)), around[-1])
    return (
        _Attention(layers, module) if module is not None and set(layers) & {"query", "fused_qkv", "fused_kv"} else None
    )


def _reads_another(attention: _Attention) -> bool:
    """Return True if the attention reads the keys and values of an earlier layer."""
    filled = set(attention.layers) & {"key", "fused_qkv", "fused_kv"}
    return not filled or getattr(attention.module, "is_kv_shared_layer", False) is True
