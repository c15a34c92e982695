"""Roles in attention: the layers inside a module that calls itself attention, or siblings that read the same input,
three or more, and one that writes back to the block's width.

Which of them is fused follows from shapes (out = q + 2 kv); which is query, key or value only from the word in the
layer's own name, because their shapes are equal.
"""

import re

from torch import nn

from peftcore.detection.feed_forward import mlp_roles
from peftcore.detection.module_tree import AdapterSlot, ModuleTree, ancestors, width_of
from peftcore.detection.roles import NOT_CONTENT, Role, Roles, word_role, words_of

_SELECTS_TOKENS = "indexer"
"""The part of sparse attention that chooses the tokens to attend to; it has queries and keys, but no gradient."""


def attention_roles(tree: ModuleTree, root: str, width: int | None = None) -> Roles:
    """Roles inside every attention module at or below `root`, a block of that width.

    Without a width, outside blocks, an attention must say so itself: there shapes alone would take a projector's MLP
    for one.
    """
    roles: Roles = {}
    for unit in attention_units(tree, root, width):
        sites = [site for site in tree.linears(unit) if site.path not in roles]
        sites = [site for site in sites if _SELECTS_TOKENS not in site.path.split(".")]
        roles |= _unit_roles(unit, sites, width or width_of(sites))
    return roles


def attention_units(tree: ModuleTree, root: str, width: int | None) -> list[str]:
    """Outermost modules below `root` named attention, else `root` or its parts with an attention's shapes."""
    units: dict[str, None] = {}
    for site in tree.linears(root):
        named = (path for path in ancestors(site.path, root) if _is_named_attention(tree, path))
        if (unit := next(named, None)) is not None:
            units[unit] = None
        elif _has_attention_shapes([s for s in tree.linears(site.parent) if s.parent == site.parent], width):
            units[site.parent] = None
    if not units and width and _is_named_attention(tree, root):
        return [root]
    return list(units)


def _is_named_attention(tree: ModuleTree, path: str) -> bool:
    if isinstance(tree.modules[path], nn.ModuleList):
        return False
    part = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    name = f"{part} {type(tree.modules[path]).__name__}".lower().replace("prelayernorm", "")
    # a whole "AttentionDecoderLayer" has its attention inside
    return ("attention" in name or "attn" in name) and not re.search("norm|encoderlayer|decoderlayer", name)


def _has_attention_shapes(siblings: list[AdapterSlot], width: int | None) -> bool:
    """Query, key and value by word, of one input; else three readers of the block's width and a way back to it."""
    said = {word_role(site.path.rpartition(".")[2]): site.in_features for site in siblings}
    if {"query", "key", "value"} <= set(said):
        return len({said["query"], said["key"], said["value"]}) == 1
    readers = [site for site in siblings if site.in_features == width]
    backs = [site for site in siblings if site.out_features == width and site not in readers[:3]]
    return len(readers) >= 3 and any(b.in_features == r.out_features for b in backs for r in readers if r is not b)


def _unit_roles(unit: str, sites: list[AdapterSlot], width: int) -> Roles:
    """Words first, then shapes for the layers whose names say nothing (c_attn, c_proj, dense, in_proj)."""
    roles = _known({site.path: word_role(site.path.removeprefix(unit).lstrip(".")) for site in sites})
    silent = [s for s in sites if s.path not in roles and not NOT_CONTENT & words_of(s.path.rpartition(".")[2])]
    mlp = [pair for pair in _by_parent(silent) if len(pair) == 2 and max(s.out_features for s in pair) > width]
    for pair in mlp:
        roles |= mlp_roles([site for site in pair if site.path not in roles], width, gated=False)
    silent = [site for site in silent if site.path not in roles]
    heads = next((site.in_features for site in sites if roles.get(site.path) == "output"), None)
    if heads is None:
        back = [site for site in silent if site.out_features == width]
        if back:
            roles[back[-1].path], heads = "output", back[-1].in_features
            silent.remove(back[-1])
    content = set(roles.values()) & {"key", "value", "fused_qkv", "fused_kv"}
    return roles if heads is None or content else roles | _unnamed_roles(silent, heads, "query" in roles.values())


def _by_parent(sites: list[AdapterSlot]) -> list[list[AdapterSlot]]:
    """Siblings together; layers alone in their parent form one group."""
    by_parent: dict[str, list[AdapterSlot]] = {}
    for site in sites:
        by_parent.setdefault(site.parent, []).append(site)
    alone = [group[0] for group in by_parent.values() if len(group) == 1]
    return [*(group for group in by_parent.values() if len(group) > 1), alone]


def _unnamed_roles(silent: list[AdapterSlot], heads: int, has_query: bool) -> Roles:
    """Roles by shape; three layers alike that no word tells apart are query, key and value as declared."""
    roles = _known({site.path: _fused_role(site, heads, has_query) for site in silent})
    unnamed = [site for site in silent if site.path not in roles]
    if len(unnamed) == 3 and len({site.in_features for site in unnamed}) == 1:
        order: tuple[Role, ...] = ("query", "key", "value")
        roles |= {site.path: role for site, role in zip(unnamed, order, strict=True)}
    return roles


def _known(roles: dict[str, Role | None]) -> Roles:
    return {path: role for path, role in roles.items() if role is not None}


def _fused_role(site: AdapterSlot, heads: int, has_query: bool) -> Role | None:
    """`heads`: total size of the query heads, which the output projection reads."""
    if has_query:
        return "fused_kv" if site.out_features % 2 == 0 else None
    keys_and_values = site.out_features - heads
    if keys_and_values > 0 and keys_and_values % 2 == 0 and heads % (keys_and_values // 2) == 0:
        return "fused_qkv"
    return None
