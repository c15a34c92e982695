"""What each layer of a block does, read from shapes and from the layer's place in its block.

Attention: the layers inside a module that calls itself attention, or siblings that read the same input, three or
more, and one that writes back to the block's width. Which of them is fused follows from shapes (out = q + 2 kv);
which is query, key or value only from the word in the layer's own name, because their shapes are equal.
MLP: a pair (width → m, m → width) is up and down; two equal siblings before the same down are gate and up; one of
size 2m is both at once. Mixer: layers beside a depthwise causal convolution (Mamba, gated delta nets).

Shapes: m inner size of an MLP.
"""

import re
from typing import Literal

from torch import nn

from peftcore.detection.module_tree import ModuleTree, Site, ancestors, expert_count, width_of

Role = Literal[
    "query",
    "key",
    "value",
    "output",
    "fused_qkv",
    "fused_kv",
    "gate",
    "up",
    "down",
    "fused_gate_up",
    "mixer",
    "router",
    "head",
    "embedding",
    "convolution",
    "unknown",
]
Roles = dict[str, Role]
"""{path of a site: its role}"""

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("q", "wq", "toq", "qproj", "query", "queries", "receptance"), "query"),
    **dict.fromkeys(("k", "wk", "tok", "kproj", "key", "keys"), "key"),
    **dict.fromkeys(("v", "wv", "tov", "vproj", "value", "values"), "value"),
    **dict.fromkeys(("qkv", "wqkv", "toqkv"), "fused_qkv"),
    **dict.fromkeys(("kv", "wkv", "tokv"), "fused_kv"),
    **dict.fromkeys(("o", "wo", "oproj", "out", "output"), "output"),
}
_NOT_CONTENT = {"pos", "position", "rel", "relative", "r", "gate", "norm", "conv", "sconv"}
"""Words of layers that serve attention without projecting its content."""
_GENERIC = {"dense", "linear", "layer", "proj"}
"""Words that say only that it is a layer, so that the module around it gives the name (`query.linear`)."""


def _words(part: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def word_role(path: str) -> Role | None:
    """Role that the last telling part of a path says: `self.query` → query, `output.dense` → output."""
    for part in reversed(path.split(".")):
        words = _words(part)
        if _NOT_CONTENT & words:
            return None
        said: set[Role] = {_WORDS[word] for word in words if word in _WORDS}
        if {"query", "key", "value"} <= said:
            return "fused_qkv"
        if {"key", "value"} <= said:
            return "fused_kv"
        if len(said) == 1:
            return said.pop()
        if words - _GENERIC:
            return None
    return None


def block_roles(tree: ModuleTree, root: str) -> Roles:
    """Roles of the linear sites in the block at `root`."""
    sites = tree.linears(root)
    if not sites:
        return {}
    width = tree.width(root)
    roles = attention_roles(tree, root, width)
    mixers = [site for site in sites if _beside_depthwise_convolution(tree, site)]
    for site in mixers:
        roles.setdefault(site.path, "mixer")
    for group in _mlp_groups([site for site in sites if site.path not in roles]):
        roles |= _mlp_roles(group, width)
    # last, because an MLP's inner size may happen to be the number of experts
    routers = [site for site in sites if site.path not in roles and _chooses_experts(tree, site)]
    roles |= dict.fromkeys((site.path for site in routers), "router")
    return roles


# -- attention ---------------------------------------------------------------------------------------------------


def attention_roles(tree: ModuleTree, root: str, width: int | None = None) -> Roles:
    """Roles inside every attention module at or below `root`, a block of that width.

    Without a width, outside blocks, an attention must say so itself: there shapes alone would take a projector's MLP
    for one.
    """
    roles: Roles = {}
    for unit in _attention_units(tree, root, width):
        sites = [site for site in tree.linears(unit) if site.path not in roles]
        roles |= _unit_roles(unit, sites, width or width_of(sites))
    return roles


def _attention_units(tree: ModuleTree, root: str, width: int | None) -> list[str]:
    """Outermost modules below `root` named attention, else `root` or its parts with an attention's shapes."""
    units: dict[str, None] = {}
    for site in tree.linears(root):
        named = (path for path in ancestors(site.path, root) if _is_named_attention(tree, path))
        if (unit := next(named, None)) is not None:
            units[unit] = None
        elif _has_attention_shapes([s for s in tree.linears(site.parent) if s.parent == site.parent], width):
            units[site.parent] = None
    return list(units)


def _is_named_attention(tree: ModuleTree, path: str) -> bool:
    if isinstance(tree.modules[path], nn.ModuleList):
        return False
    part = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
    name = f"{part} {type(tree.modules[path]).__name__}".lower()
    # a whole "AttentionDecoderLayer" has its attention inside
    return ("attention" in name or "attn" in name) and not re.search("norm|encoderlayer|decoderlayer", name)


def _has_attention_shapes(siblings: list[Site], width: int | None) -> bool:
    """Query, key and value by word, of one input; else three readers of the block's width and a way back to it."""
    said = {word_role(site.path.rpartition(".")[2]): site.in_features for site in siblings}
    if {"query", "key", "value"} <= set(said):
        return len({said["query"], said["key"], said["value"]}) == 1
    readers = [site for site in siblings if site.in_features == width]
    backs = [site for site in siblings if site.out_features == width and site not in readers[:3]]
    return len(readers) >= 3 and any(b.in_features == r.out_features for b in backs for r in readers if r is not b)


def _unit_roles(unit: str, sites: list[Site], width: int) -> Roles:
    """Words first, then shapes for the layers whose names say nothing (c_attn, c_proj, dense, in_proj)."""
    roles = _known({site.path: word_role(site.path.removeprefix(unit).lstrip(".")) for site in sites})
    silent = [s for s in sites if s.path not in roles and not _NOT_CONTENT & _words(s.path.rpartition(".")[2])]
    mlp = [pair for pair in _mlp_groups(silent) if len(pair) == 2 and max(s.out_features for s in pair) > width]
    for pair in mlp:
        roles |= _mlp_roles([site for site in pair if site.path not in roles], width, gated=False)
    silent = [site for site in silent if site.path not in roles]
    heads = next((site.in_features for site in sites if roles.get(site.path) == "output"), None)
    if heads is None:
        back = [site for site in silent if site.out_features == width]
        if back:
            roles[back[-1].path], heads = "output", back[-1].in_features
            silent.remove(back[-1])
    content = set(roles.values()) & {"key", "value", "fused_qkv", "fused_kv"}
    return roles if heads is None or content else roles | _unnamed_roles(silent, heads, "query" in roles.values())


def _unnamed_roles(silent: list[Site], heads: int, has_query: bool) -> Roles:
    """Roles by shape; three layers alike that no word tells apart are query, key and value as declared."""
    roles = _known({site.path: _fused_role(site, heads, has_query) for site in silent})
    unnamed = [site for site in silent if site.path not in roles]
    if len(unnamed) == 3 and len({site.in_features for site in unnamed}) == 1:
        order: tuple[Role, ...] = ("query", "key", "value")
        roles |= {site.path: role for site, role in zip(unnamed, order, strict=True)}
    return roles


def _known(roles: dict[str, Role | None]) -> Roles:
    return {path: role for path, role in roles.items() if role is not None}


def _fused_role(site: Site, heads: int, has_query: bool) -> Role | None:
    """`heads`: total size of the query heads, which the output projection reads."""
    if has_query:
        return "fused_kv" if site.out_features % 2 == 0 else None
    keys_and_values = site.out_features - heads
    if keys_and_values > 0 and keys_and_values % 2 == 0 and heads % (keys_and_values // 2) == 0:
        return "fused_qkv"
    return None


# -- mixers and experts ------------------------------------------------------------------------------------------


def _beside_depthwise_convolution(tree: ModuleTree, site: Site) -> bool:
    return any(
        isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1
        for child in tree.parent_of(site).children()
    )


def _chooses_experts(tree: ModuleTree, site: Site) -> bool:
    """A layer with one output per expert (or one gate for the shared expert), next to the experts."""
    around = [tree.parent_of(site), tree.modules[site.parent.rpartition(".")[0]]]
    counts = [expert_count(child) for module in around for child in module.children()]
    return any(counts) and (site.out_features == 1 or site.out_features in counts)


# -- MLP ---------------------------------------------------------------------------------------------------------


def _mlp_groups(sites: list[Site]) -> list[list[Site]]:
    """Siblings together; layers alone in their parent (BERT's intermediate.dense, output.dense) form one group."""
    by_parent: dict[str, list[Site]] = {}
    for site in sites:
        by_parent.setdefault(site.parent, []).append(site)
    alone = [group[0] for group in by_parent.values() if len(group) == 1]
    return [*(group for group in by_parent.values() if len(group) > 1), alone]


def _mlp_roles(group: list[Site], block_width: int, gated: bool = True) -> Roles:
    """Roles of one group; nothing where its shapes are no MLP's."""
    roles: Roles = {}
    for position, down in reversed(list(enumerate(group))):
        inner, width = down.in_features, down.out_features
        # square layers differ by their order alone: up comes before down
        others = group[:position] if inner == width else [site for site in group if site is not down]
        others = [site for site in others if site.path not in roles and site.in_features == width]
        equal = [site for site in others if site.out_features == inner]
        double = [site for site in others if site.out_features == 2 * inner]
        if down.path in roles:
            continue
        if gated and len(equal) >= 2:
            gate, up = _gate_first(equal[-2:])
            roles |= {gate.path: "gate", up.path: "up", down.path: "down"}
        elif gated and double and width == block_width:
            roles |= {double[-1].path: "fused_gate_up", down.path: "down"}
        # a bottleneck (adapter, LAuReL, per-layer gate) has an MLP's shapes turned inside out
        elif equal and inner >= width == block_width:
            roles |= {equal[-1].path: "up", down.path: "down"}
    return roles


def _gate_first(pair: list[Site]) -> list[Site]:
    """Gate, then up: by the word, else in order of declaration, which every known gated MLP keeps."""
    return sorted(pair, key=lambda site: "gate" not in site.path.rpartition(".")[2])
