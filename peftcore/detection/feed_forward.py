"""Roles of MLP layers, found by shape: gate, up, down and fused gate-up.

A pair (width → m, m → width) is up and down. Two equal siblings (width → m) before a down layer are gate and up. A
layer (width → 2m) before a down layer is a fused gate-up. Shapes: m inner size of an MLP.
"""

from peftcore.detection.module_tree import AdaptableLayer, ancestors
from peftcore.detection.roles import Roles, words_of

_NO_MLP = {"bottleneck", "adapter"}
"""Words of modules with the inverse shapes of an MLP, narrow inside."""
_MLP_WORDS = {"mlp", "ffn", "ff", "feed", "feedforward", "forward", "expert", "experts", "intermediate"}


def feed_forward_roles(root: str, layers: list[AdaptableLayer], width: int) -> Roles:
    """Return the roles of the layers of a block whose shapes are those of an MLP.

    Siblings are tried first, then the layers of ever larger parts of the block (CPM-Ant has gate and up one module
    deeper than down), at last the whole block (BERT's intermediate.dense and output.dense).

    Args:
        root: Path of the block.
        layers: The block's layers without a role so far.
        width: The block's width.
    """
    roles: Roles = {}
    layers = [layer for layer in layers if not _has_word(_NO_MLP, layer.path.removeprefix(root))]
    parts = {part for layer in layers for part in ancestors(layer.path, root)}
    for part in [*sorted(parts, key=lambda part: -part.count(".")), root]:
        group = [layer for layer in layers if layer.path not in roles and layer.path.startswith(f"{part}.")]
        if len(group) > 1:
            roles |= mlp_roles(group, width) or _named_mlp(part.removeprefix(root), group)
    return roles


def mlp_roles(group: list[AdaptableLayer], block_width: int, gated: bool = True) -> Roles:
    """Return {path: role} of the layers that form MLPs by their shapes; {} if no layers of the group do.

    Args:
        group: The layers, in order of declaration.
        block_width: Width of the residual stream in the block.
        gated: True also finds gated MLPs: gate, up and down, or a fused gate-up and down.
    """
    roles: Roles = {}
    for position, down in reversed(list(enumerate(group))):
        inner, width = down.in_features, down.out_features
        # square layers: only the order tells up from down
        others = group[:position] if inner == width else [layer for layer in group if layer is not down]
        others = [layer for layer in others if layer.path not in roles and layer.in_features == width]
        equal = [layer for layer in others if layer.out_features == inner]
        double = [layer for layer in others if layer.out_features == 2 * inner]
        if down.path in roles:
            continue
        if gated and len(equal) >= 2 and equal[-1].parent == equal[-2].parent:
            gate, up = _gate_first(equal[-2:])
            roles |= {gate.path: "gate", up.path: "up", down.path: "down"}
        elif gated and double and width == block_width:
            roles |= {double[-1].path: "fused_gate_up", down.path: "down"}
        # a bottleneck (adapter, LAuReL, per-layer gate) has the inverse shapes
        elif equal and width == block_width and (inner >= width or _has_word(_MLP_WORDS, down.path)):
            roles |= {equal[-1].path: "up", down.path: "down"}
    return roles


def _named_mlp(part: str, group: list[AdaptableLayer]) -> Roles:
    """Return up and down of a two-layer MLP that is found by its name and changes the width (LightGlue, Perceiver)."""
    first, last = group[0], group[-1]
    if (
        len(group) != 2
        or not _has_word(_MLP_WORDS, part)
        or first.parent != last.parent
        or first.out_features != last.in_features
    ):
        return {}
    return {first.path: "up", last.path: "down"}


def _has_word(words: set[str], path: str) -> bool:
    return any(words & words_of(name) for name in path.split("."))


def _gate_first(pair: list[AdaptableLayer]) -> list[AdaptableLayer]:
    """Return gate, then up: by name, else in order of declaration, as in all known gated MLPs."""
    return sorted(pair, key=lambda layer: "gate" not in layer.path.rpartition(".")[2])
