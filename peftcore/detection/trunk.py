"""The main stack of a model with several: the blocks its tokens go through, and whether documents may share a row."""

import re
from typing import Any

from torch import nn

from peftcore.detection.module_tree import BlockList, ModuleTree, is_below, look_through
from peftcore.detection.roles import ATTENTION, Roles, is_depthwise, mixer_sites

STATE = re.compile(r"linear_?att|lightning|delta_?(net|att)|mamba|recurrent|retention|lstm|^conv$", re.IGNORECASE)
"""Layer types and classes that carry a state from token to token in the place of keys and values."""

SPARSE_OR_APPROXIMATE = frozenset(
    {"bigbird_pegasus", "big_bird", "fnet", "funnel", "led", "longformer"}
    | {"longt5", "mra", "nystromformer", "pegasus_x", "reformer", "yoso"}
)
"""Families whose attention takes no mask of token pairs: windows, hashes, low ranks, Fourier transforms."""


def find_trunk(model: nn.Module, tree: ModuleTree, roles: Roles, blocks: tuple[BlockList, ...]) -> BlockList | None:
    """The blocks nearest to the token embedding in the module tree, the decoder's before the encoder's.

    Without tokens those with most weights; lists without attention or mixers (mergers, box heads) only if no other is.
    """
    mixing = [path for path, role in roles.items() if role in (*ATTENTION, "mixer")]
    able = [b for b in blocks if any(is_below(path, root) for root in b.paths for path in mixing)] or list(blocks)
    able = [b for b in able if "cross" not in b.pattern] or able
    embedding = token_embedding(model, tree)
    if embedding is None or not able:
        return able[0] if able else None
    decoders = [block for block in able if "decoder" in block.pattern.split(".")]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and decoders:
        able = decoders
    width = tree.sites[embedding].out_features
    # of equals the first, which has most weights
    return max(able, key=lambda block: (_shared_parts(block.pattern, embedding), block.hidden_size == width))


def token_embedding(model: nn.Module, tree: ModuleTree) -> str | None:
    """Path of the embedding that the model, or else a model in it, names as its input; None without tokens.

    Two-tower models name none: there it is the table with as many rows as their text configuration says.
    """
    tables = {id(site.layer): site for site in tree.sites.values() if site.kind == "embedding"}
    for module in (model, *model.children()):
        getter = getattr(module, "get_input_embeddings", None)
        try:
            named = getter() if callable(getter) else None
        except (AttributeError, NotImplementedError):  # what those raise that have none of their own (CLIP)
            continue
        layer = look_through(named) if isinstance(named, nn.Module) else nn.Identity()
        table = next((tables[id(part)] for part in layer.modules() if id(part) in tables), None)
        # the input layer of a vision tower may keep its positions in a table
        if table is not None and (table.layer is layer or "token" in table.path.rpartition(".")[2]):
            return table.path
    rows = getattr(text_config(model), "vocab_size", None)
    return next((s.path for s in tables.values() if s.in_features == rows and not tree.block_of(s.path)), None)


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text decoder, where it has one of its own; None for a model without any."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text(decoder=True) if callable(text) else config


def _shared_parts(one: str, other: str) -> int:
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def is_packable(model: nn.Module, tree: ModuleTree, roles: Roles, trunk: BlockList | None, family: str) -> bool:
    """Whether nothing but maskable attention carries information from token to token."""
    config = getattr(model, "config", None)
    if trunk is None or token_embedding(model, tree) is None or getattr(config, "is_encoder_decoder", False):
        return False
    if getattr(model, "_is_stateful", False) or family in SPARSE_OR_APPROXIMATE or _state_by_type(text_config(model)):
        return False
    inside = [tree.modules[path] for path in tree.modules if any(is_below(path, root) for root in trunk.paths)]
    if any(isinstance(m, nn.RNNBase) or is_depthwise(m) or _keeps_state(m, model) for m in inside):
        return False
    mixes = any(mixer_sites(tree, root) for root in trunk.paths)
    attends = any(roles[path] in ATTENTION for path in roles if any(is_below(path, root) for root in trunk.paths))
    return attends and not mixes


def _keeps_state(module: nn.Module, model: nn.Module) -> bool:
    return STATE.search(type(module).__name__.removeprefix(own_name(text_config(model)))) is not None


def own_name(config: Any) -> str:
    """What the classes of a family begin with: a family may be called after what few of its layers are."""
    return type(config).__name__.removesuffix("Config").removesuffix("Text")


def _state_by_type(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or []
    return any(isinstance(kind, str) and STATE.search(kind) for kind in kinds)
