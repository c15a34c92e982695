"""Roles of attention layers: query, key, value, output and fused projections.

An attention is a module whose name contains "attention" or "attn", or a group of siblings in which at least three
layers read the block's width and one layer projects back to that width. Fused projections are recognised by shape (out
= q + 2 kv). Query, key and value have equal shapes, so the words in their names decide.
"""

import re

from torch import nn

from peftcore.detection.feed_forward import mlp_roles
from peftcore.detection.module_tree import AdaptableLayer, ModuleTree, ancestors, width_of
from peftcore.detection.roles import NOT_CONTENT, Role, Roles, word_role, words_of

_SELECTS_TOKENS = "indexer"
"""Name of the part of sparse attention that selects tokens; its queries and keys receive no gradient."""


def attention_roles(tree: ModuleTree, root: str, width: int | None = None) -> Roles:
    """Return the roles of the layers in all attentions at or below `root`.

    Args:
        tree: The model's module tree.
        root: Path of a block, or "" for the model.
        width: The block's width. None outside of blocks: attention is then found by name only, because a projector's
            MLP can have the shapes of an attention.
    """
    roles: Roles = {}
    for unit in attention_units(tree, root, width):
        layers = [layer for layer in tree.linears(unit) if layer.path not in roles]
        layers = [layer for layer in layers if _SELECTS_TOKENS not in layer.path.split(".")]
        roles |= _unit_roles(unit, layers, width or width_of(layers))
    return roles


def attention_units(tree: ModuleTree, root: str, width: int | None) -> list[str]:
    """Return the outermost modules below `root` that are attentions, by name or else by the shapes of their layers."""
    units: dict[str, None] = {}
    for layer in tree.linears(root):
        named = (path for path in ancestors(layer.path, root) if _is_named_attention(tree, path))
        if (unit := next(named, None)) is not None:
            units[unit] = None
        elif _has_attention_shapes([s for s in tree.linears(layer.parent) if s.parent == layer.parent], width):
            units[layer.parent] = None
    if not units and width and _is_named_attention(tree, root):
        return [root]
    return list(units)


def _is_named_attention(tree: ModuleTree, path: str) -> bool:
    """Return True if the module's name or class contains "attention" or "attn"."""
    if isinstance(tree.modules[path], nn.ModuleList):
        return False
    part = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    name = f"{part} {type(tree.modules[path]).__name__}".lower().replace("prelayernorm", "")
    # an "AttentionDecoderLayer" is a block that contains an attention
    return ("attention" in name or "attn" in name) and not re.search("norm|encoderlayer|decoderlayer", name)


def _has_attention_shapes(siblings: list[AdaptableLayer], width: int | None) -> bool:
    """Return True for query, key and value by name, or for three readers of the width and one layer back to it."""
    width_of_role = {word_role(layer.path.rpartition(".")[2]): layer.in_features for layer in siblings}
    if {"query", "key", "value"} <= set(width_of_role):
        return len({width_of_role[role] for role in ("query", "key", "value")}) == 1
    readers = [layer for layer in siblings if layer.in_features == width]
    returns = [layer for layer in siblings if layer.out_features == width and layer not in readers[:3]]
    return len(readers) >= 3 and any(b.in_features == r.out_features for b in returns for r in readers if r is not b)


def _unit_roles(unit: str, layers: list[AdaptableLayer], width: int) -> Roles:
    """Return roles by name, and by shape for layers without an informative name (c_attn, c_proj, dense, in_proj)."""
    roles = _without_none({layer.path: word_role(layer.path.removeprefix(unit).lstrip(".")) for layer in layers})
    unnamed = [s for s in layers if s.path not in roles and not NOT_CONTENT & words_of(s.path.rpartition(".")[2])]
    mlp = [pair for pair in _by_parent(unnamed) if len(pair) == 2 and max(s.out_features for s in pair) > width]
    for pair in mlp:
        roles |= mlp_roles([layer for layer in pair if layer.path not in roles], width, gated=False)
    unnamed = [layer for layer in unnamed if layer.path not in roles]
    heads = next((layer.in_features for layer in layers if roles.get(layer.path) == "output"), None)
    if heads is None:
        back = [layer for layer in unnamed if layer.out_features == width]
        if back:
            roles[back[-1].path], heads = "output", back[-1].in_features
            unnamed.remove(back[-1])
    content = set(roles.values()) & {"key", "value", "fused_qkv", "fused_kv"}
    return roles if heads is None or content else roles | _unnamed_roles(unnamed, heads, "query" in roles.values())


def _by_parent(layers: list[AdaptableLayer]) -> list[list[AdaptableLayer]]:
    """Group layers by parent; layers without siblings form one group."""
    by_parent: dict[str, list[AdaptableLayer]] = {}
    for layer in layers:
        by_parent.setdefault(layer.parent, []).append(layer)
    alone = [group[0] for group in by_parent.values() if len(group) == 1]
    return [*(group for group in by_parent.values() if len(group) > 1), alone]


def _unnamed_roles(unnamed: list[AdaptableLayer], heads: int, has_query: bool) -> Roles:
    """Return roles by shape; three equal layers are query, key and value in order of declaration."""
    roles = _without_none({layer.path: _fused_role(layer, heads, has_query) for layer in unnamed})
    rest = [layer for layer in unnamed if layer.path not in roles]
    if len(rest) == 3 and len({layer.in_features for layer in rest}) == 1:
        order: tuple[Role, ...] = ("query", "key", "value")
        roles |= {layer.path: role for layer, role in zip(rest, order, strict=True)}
    return roles


def _without_none(roles: dict[str, Role | None]) -> Roles:
    return {path: role for path, role in roles.items() if role is not None}


def _fused_role(layer: AdaptableLayer, heads: int, has_query: bool) -> Role | None:
    """Return the fused role that fits a layer's size; `heads`: total size of the query heads."""
    if has_query:
        return "fused_kv" if layer.out_features % 2 == 0 else None
    keys_and_values = layer.out_features - heads
    if keys_and_values > 0 and keys_and_values % 2 == 0 and heads % (keys_and_values // 2) == 0:
        return "fused_qkv"
    return None
