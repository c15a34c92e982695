"""What each layer of a block does, read from shapes and from the layer's place in its block.

`attention` finds query, key, value and output, `feed_forward` gate, up and down. Here: the words both read names by,
the layers of a mixer (beside a depthwise causal convolution: Mamba, gated delta nets), and routers of experts.
"""

import re
from typing import Literal

from torch import nn

from peftcore.detection.module_tree import AdapterSlot, ModuleTree
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
"""{path of a site: its role}"""

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
"""Words of layers that serve attention without projecting its content."""
_GENERIC = {"dense", "linear", "layer", "proj"}
"""Words that say only that it is a layer, so that the module around it gives the name (`query.linear`)."""


def words_of(part: str) -> set[str]:
    """Lower-case words in one part of a path: `kv_a_proj` → kv, a, proj."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def word_role(path: str) -> Role | None:
    """Role that the last telling part of a path says: `self.query` → query, `output.dense` → output."""
    for part in reversed(path.split(".")):
        words = words_of(part)
        if NOT_CONTENT & words:
            return None
        said: set[Role] = {_WORDS[word] for word in words if word in _WORDS}
        if {"query", "key", "value"} <= said:
            return "fused_qkv"
        if {"key", "value"} <= said:
            return "fused_kv"
        if len(said) == 1:
            return said.pop()
        if said == {"query", "key"}:  # one projection for both (Reformer)
            return "query"
        if words - _GENERIC:
            return None
    return None


def mixer_sites(tree: ModuleTree, root: str) -> list[AdapterSlot]:
    """Layers in the block at `root` that stand beside a depthwise convolution over time."""
    return [site for site in tree.linears(root) if any(map(is_depthwise, tree.parent_of(site).children()))]


def is_depthwise(module: nn.Module) -> bool:
    """Whether it mixes neighbours in time, each channel for itself."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1


def router_sites(tree: ModuleTree, root: str) -> list[AdapterSlot]:
    """Layers in the block at `root` that choose experts."""
    return [site for site in tree.linears(root) if _chooses_experts(tree, site)]


def _chooses_experts(tree: ModuleTree, site: AdapterSlot) -> bool:
    """A layer with one output per expert (or one gate for the shared expert), next to the experts."""
    around = [tree.parent_of(site), tree.modules[site.parent.rpartition(".")[0]]]
    counts = [expert_count(child) for module in around for child in module.children()]
    return any(counts) and (site.out_features == 1 or site.out_features in counts)
