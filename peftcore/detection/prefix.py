"""Geometry of a key/value prefix: what each decoder layer keeps in its cache, read from the layers that fill it."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcore.detection.module_tree import AdapterSlot, BlockList, ModuleTree, walk
from peftcore.detection.roles import ATTENTION, Role, Roles
from peftcore.detection.trunk import STATE, own_name, text_config

_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
"""What the attention modules of transformers call the size of one head."""
_OTHER_CACHE = re.compile(r"cross|encoder_?attn|encdec|enc_dec|encoder_decoder", re.IGNORECASE)
"""Attention to something else than the text: its keys are not the prefix's."""


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that one layer keeps for one token. Counts."""

    kv_heads: int
    head_dim: int
    """Size of one key."""
    value_dim: int
    """Size of one value; multi-head latent attention has other values than keys."""


@dataclass(frozen=True)
class PrefixGeometry:
    """What a learned prefix must fit: the cache of the decoder (of the only stack, where there is one). Counts."""

    num_layers: int
    """Slots of the cache: one for each run of a block, also for those that keep no keys and values."""
    num_attention_heads: int
    """Query heads of a layer."""
    num_kv_heads: int
    """Of the widest layer, as PEFT sizes its prefix."""
    head_dim: int
    """Of the widest layer's keys."""
    token_dim: int
    """Width of a token's embedding, for prompts that are fed in as embeddings."""
    layers: tuple[LayerCache | None, ...]
    """By layer; None where a layer keeps none of its own: it shares another's, or does not attend to the text."""
    shared: tuple[int, ...]
    """Layers that read the keys and values of an earlier one."""

    @property
    def kv_dim(self) -> int:
        """Width of one layer's keys for one token: kv heads times head_dim; PEFT's `token_dim` of a prefix."""
        return self.num_kv_heads * self.head_dim

    @property
    def uniform(self) -> bool:
        """Whether every layer keeps the same shape, keys like values."""
        kept = set(self.layers)
        return len(kept) == 1 and all(layer and layer.head_dim == layer.value_dim for layer in kept)


@dataclass(frozen=True)
class _Attention:
    """The layers of one block's self-attention by role, and the module that computes with them."""

    sites: dict[Role, AdapterSlot]
    module: Any

    def measure(self, config: Any) -> tuple[LayerCache, int]:
        """The cache of this layer and the number of its query heads."""
        rank, query_width = getattr(self.module, "kv_lora_rank", None), self._query_width()
        if rank and hasattr(self.module, "v_head_dim"):  # latent attention keeps the latent and the rotated part
            heads = query_width // int(self.module.v_head_dim)
            return LayerCache(1, int(rank), int(self.module.qk_rope_head_dim)), heads
        head_dim = self._head_dim(config, query_width)
        key_width, value_width = self._kv_widths(query_width, head_dim)
        kv_heads = max(key_width // head_dim, 1)
        return LayerCache(kv_heads, head_dim, value_width // kv_heads), query_width // head_dim

    def _query_width(self) -> int:
        if "output" in self.sites:
            return self.sites["output"].in_features
        if "query" in self.sites:
            return self.sites["query"].out_features
        fused = self.sites.get("fused_qkv")
        return fused.out_features // 3 if fused else self.sites["fused_kv"].out_features // 2

    def _head_dim(self, config: Any, query_width: int) -> int:
        own = (getattr(self.module, name, None) for name in _HEAD_SIZES)
        if size := next((size for size in own if isinstance(size, int)), None):
            return size
        heads = getattr(self.module, "num_heads", None) or getattr(config, "num_attention_heads", None)
        return getattr(config, "head_dim", None) or (query_width // heads if heads else query_width)

    def _kv_widths(self, query_width: int, head_dim: int) -> tuple[int, int]:
        if "key" in self.sites:
            key = self.sites["key"].out_features
            return key, self.sites["value"].out_features if "value" in self.sites else key
        fused = self.sites.get("fused_qkv")
        both = fused.out_features - query_width if fused else self.sites["fused_kv"].out_features
        return (both, both) if both == head_dim else (both // 2, both // 2)  # one head whose keys are its values


def find_prefix(
    model: nn.Module, tree: ModuleTree, roles: Roles, trunk: BlockList, token_dim: int
) -> PrefixGeometry | None:
    """Geometry for the blocks of `trunk`; None where no layer keeps keys and values, or none can be handed in."""
    if not _takes_cache(tree, trunk.paths[0]):
        return None
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or []
    kinds = list(kinds) if len(kinds) == trunk.count else [""] * trunk.count
    by_layer = {id(site.layer): site for site in tree.sites.values()}
    found = [
        None if STATE.search(kind) else _attention(tree.modules[path], by_layer, roles, own_name(config))
        for path, kind in zip(trunk.paths, kinds, strict=True)
    ]
    shared = tuple(i for i, attention in enumerate(found) if attention and _reads_another(attention))
    measured = [
        attention.measure(config) if attention and i not in shared else None for i, attention in enumerate(found)
    ]
    kept = [both for both in measured if both]
    if not kept:
        return None
    runs = _runs(config, trunk)
    widest, query_heads = max(kept, key=lambda both: both[0].kv_heads * both[0].head_dim)
    return PrefixGeometry(
        num_layers=trunk.count * runs,
        num_attention_heads=query_heads,
        num_kv_heads=widest.kv_heads,
        head_dim=widest.head_dim,
        token_dim=token_dim,
        layers=tuple(both[0] if both else None for both in measured) * runs,
        shared=shared,
    )


def _runs(config: Any, trunk: BlockList) -> int:
    """How often a token goes through the same blocks, each time with a cache of its own (HRM); else 1."""
    slots = getattr(config, "num_hidden_layers", trunk.count)
    looped = not getattr(config, "is_encoder_decoder", False) and slots % trunk.count == 0
    return slots // trunk.count if looped and slots > trunk.count else 1


def _takes_cache(tree: ModuleTree, block: str) -> bool:
    """Whether a module around the block takes keys and values from its caller."""
    parts = block.split(".")
    around = (tree.modules.get(".".join(parts[:end])) for end in range(len(parts)))
    names = {"cache", "past_key_values"}  # transformers renamed the argument in 5.24
    return any(names & set(inspect.signature(m.forward).parameters) for m in around if m is not None)


def _attention(block: nn.Module, by_layer: dict[int, AdapterSlot], roles: Roles, family: str) -> _Attention | None:
    """Self-attention of a block; looked for by identity, because Zamba's blocks share one and the same."""
    modules = dict(walk(block))
    sites: dict[Role, AdapterSlot] = {}
    module: nn.Module | None = None
    for path, layer in modules.items():
        site = by_layer.get(id(layer))
        if site is None or _OTHER_CACHE.search(path) or roles[site.path] not in ATTENTION:
            continue
        parts = path.split(".")
        around = [modules[".".join(parts[:end])] for end in range(len(parts))]
        if any(STATE.search(type(m).__name__.removeprefix(family)) for m in around[1:]):
            continue
        sites.setdefault(roles[site.path], site)
        module = module or next((m for m in reversed(around) if any(hasattr(m, n) for n in _HEAD_SIZES)), around[-1])
    return _Attention(sites, module) if module is not None and set(sites) & {"query", "fused_qkv", "fused_kv"} else None


def _reads_another(attention: _Attention) -> bool:
    filled = set(attention.sites) & {"key", "fused_qkv", "fused_kv"}
    return not filled or getattr(attention.module, "is_kv_shared_layer", False) is True
