"""Roles in MLPs: a pair (width → m, m → width) is up and down; two equal siblings before one down are gate and up;
one of size 2m is both at once.

Shapes: m inner size of an MLP.
"""

from peftcore.detection.module_tree import AdapterSlot, ModuleTree, ancestors
from peftcore.detection.roles import Roles, words_of

_NO_MLP = {"bottleneck", "adapter"}
"""What has an MLP's shapes turned inside out."""
_MLP_WORDS = {"mlp", "ffn", "ff", "feed", "feedforward", "forward", "expert", "experts", "intermediate"}


def feed_forward_roles(tree: ModuleTree, root: str, sites: list[AdapterSlot], width: int) -> Roles:
    """Roles of those of the block's `sites` whose shapes are an MLP's.

    Siblings are tried first, then what ever larger parts of the block hold (CPM-Ant keeps gate and up one module
    deeper than down), at last the whole block (BERT's intermediate.dense and output.dense).
    """
    roles: Roles = {}
    sites = [site for site in sites if not _says(_NO_MLP, site.path.removeprefix(root))]
    parts = {part for site in sites for part in ancestors(site.path, root)}
    for part in [*sorted(parts, key=lambda part: -part.count(".")), root]:
        group = [site for site in sites if site.path not in roles and site.path.startswith(f"{part}.")]
        if len(group) > 1:
            roles |= mlp_roles(group, width) or _named_mlp(part.removeprefix(root), group)
    return roles


def mlp_roles(group: list[AdapterSlot], block_width: int, gated: bool = True) -> Roles:
    """Roles of layers that may be one MLP; nothing where their shapes are no MLP's."""
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
        if gated and len(equal) >= 2 and equal[-1].parent == equal[-2].parent:
            gate, up = _gate_first(equal[-2:])
            roles |= {gate.path: "gate", up.path: "up", down.path: "down"}
        elif gated and double and width == block_width:
            roles |= {double[-1].path: "fused_gate_up", down.path: "down"}
        # a bottleneck (adapter, LAuReL, per-layer gate) has an MLP's shapes turned inside out
        elif equal and width == block_width and (inner >= width or _says(_MLP_WORDS, down.path)):
            roles |= {equal[-1].path: "up", down.path: "down"}
    return roles


def _named_mlp(part: str, group: list[AdapterSlot]) -> Roles:
    """Up and down of a two-layer MLP that says so itself and widens or narrows the stream (LightGlue, Perceiver)."""
    first, last = group[0], group[-1]
    if (
        len(group) != 2
        or not _says(_MLP_WORDS, part)
        or first.parent != last.parent
        or first.out_features != last.in_features
    ):
        return {}
    return {first.path: "up", last.path: "down"}


def _says(words: set[str], path: str) -> bool:
    return any(words & words_of(name) for name in path.split("."))


def _gate_first(pair: list[AdapterSlot]) -> list[AdapterSlot]:
    """Gate, then up: by the word, else in order of declaration, which every known gated MLP keeps."""
    return sorted(pair, key=lambda site: "gate" not in site.path.rpartition(".")[2])
