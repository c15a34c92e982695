"""Layer roles, and the rules for roles outside of attention and MLPs.

`attention` finds query, key, value and output layers; `feed_forward` finds gate, up and down layers. This module holds
the words that both modules look for in layer names. It also finds the layers of mixers (Mamba, gated delta nets), which
stand beside a depthwise convolution, and the routers of experts.
"""

import re
from typing import Literal

from torch import nn

from peftcore.detection.module_tree import AdaptableLayer, ModuleTree
from peftcore.detection.parameters import expert_count

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
    "grouped_convolution",
    "unknown",
]
Roles = dict[str, Role]
"""{path of a layer: its role}"""

ATTENTION: tuple[Role, ...] = ("query", "key", "value", "output", "fused_qkv", "fused_kv")
FEED_FORWARD: tuple[Role, ...] = ("gate", "up", "down", "fused_gate_up")

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("q", "wq", "toq", "qproj", "query", "queries", "receptance"), "query"),
    **dict.fromkeys(("k", "wk", "tok", "kproj", "key", "keys"), "key"),
    **dict.fromkeys(("v", "wv", "tov", "vproj", "value", "values"), "value"),
    **dict.fromkeys(("qkv", "wqkv", "toqkv"), "fused_qkv"),
    **dict.fromkeys(("kv", "wkv", "tokv"), "fused_kv"),
    **dict.fromkeys(("o", "wo", "oproj", "out", "output"), "output"),
}
NOT_CONTENT = {"pos", "position", "rel", "relative", "r", "gate", "norm", "conv", "sconv"}
"""Words in the names of attention layers that are not query, key, value or output projections."""
_GENERIC = {"dense", "linear", "layer", "proj"}
"""Words without a meaning for the role; the parent module's name decides (`query.linear`)."""


def words_of(part: str) -> set[str]:
    """Return the lower-case words in one segment of a path: `kv_a_proj` → kv, a, proj."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def word_role(path: str) -> Role | None:
    """Return the role named by the last informative segment of a path: `self.query` → query; None if there is none."""
    for part in reversed(path.split(".")):
        words = words_of(part)
        if {"q", "gate"} <= words:  # one projection for queries and their gates (MiniCPM5)
            return "query"
        if NOT_CONTENT & words:
            return None
        roles: set[Role] = {_WORDS[word] for word in words if word in _WORDS}
        if {"query", "key", "value"} <= roles:
            return "fused_qkv"
        if {"key", "value"} <= roles:
            return "fused_kv"
        if len(roles) == 1:
            return roles.pop()
        if roles == {"query", "key"}:  # one projection for both (Reformer)
            return "query"
        if words - _GENERIC:
            return None
    return None


def mixer_layers(tree: ModuleTree, root: str) -> list[AdaptableLayer]:
    """Return the layers in the block at `root` that are siblings of a depthwise convolution over time."""
    return [layer for layer in tree.linears(root) if any(map(is_depthwise, tree.parent_of(layer).children()))]


def is_depthwise(module: nn.Module) -> bool:
    """Return True for a depthwise 1-D convolution: it mixes neighbouring tokens, each channel separately."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1


def router_layers(tree: ModuleTree, root: str) -> list[AdaptableLayer]:
    """Return the layers in the block at `root` that choose experts."""
    return [layer for layer in tree.linears(root) if _chooses_experts(tree, layer)]


def _chooses_experts(tree: ModuleTree, layer: AdaptableLayer) -> bool:
    """Return True for a layer next to experts with one output per expert, or one output for a shared expert's gate."""
    around = [tree.parent_of(layer), tree.modules[layer.parent.rpartition(".")[0]]]
    counts = [expert_count(child) for module in around for child in module.children()]
    return any(counts) and (layer.out_features == 1 or layer.out_features in counts)
