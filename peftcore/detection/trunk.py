"""The trunk of a model: the stack of blocks that processes its tokens, and facts that follow from the trunk.

Models with several stacks (encoder and decoder, text and vision) have one trunk. This module also finds the token
embedding, the vocabulary size, and whether several documents can share a row (packing).
"""

import re
from typing import Any

from torch import nn

from peftcore.detection.module_tree import BlockList, ModuleTree, is_below, look_through
from peftcore.detection.roles import ATTENTION, Roles, is_depthwise, mixer_layers

STATE = re.compile(r"linear_?att|lightning|delta_?(net|att)|mamba|recurrent|retention|lstm|^conv$", re.IGNORECASE)
"""Layer types and classes that carry a recurrent state in place of keys and values."""

SPARSE_OR_APPROXIMATE = frozenset(
    {"bigbird_pegasus", "big_bird", "fnet", "funnel", "led", "longformer"}
    | {"longt5", "mra", "nystromformer", "pegasus_x", "reformer", "yoso"}
)
"""Families whose attention does not support a mask of token pairs: windows, hashes, low ranks, Fourier transforms."""

STATEFUL = frozenset({"deepseek_v4", "rwkv", "xlstm"})
"""Families with a state, recurrent or of compressed keys, that neither their layer types nor their classes name."""


def find_trunk(model: nn.Module, tree: ModuleTree, roles: Roles, blocks: tuple[BlockList, ...]) -> BlockList | None:
    """Return the block list nearest to the token embedding in the module tree; a decoder before an encoder.

    A model without tokens has the list with most weights. Lists without attention or mixers (mergers, box heads) are
    used only if there is no other list.

    Args:
        model: The model.
        tree: Its module tree.
        roles: Roles of its layers.
        blocks: Its block lists, the list with most weights first.
    """
    mixing = [path for path, role in roles.items() if role in (*ATTENTION, "mixer")]
    candidates = [b for b in blocks if any(is_below(path, root) for root in b.paths for path in mixing)] or list(blocks)
    candidates = [b for b in candidates if "cross" not in b.pattern] or candidates
    embedding = token_embedding(model, tree)
    if embedding is None or not candidates:
        return candidates[0] if candidates else None
    decoders = [block for block in candidates if "decoder" in block.pattern.split(".")]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and decoders:
        candidates = decoders
    width = tree.layers[embedding].out_features
    # ties are resolved by the first list, which has most weights
    return max(candidates, key=lambda block: (_shared_parts(block.pattern, embedding), block.hidden_size == width))


def token_embedding(model: nn.Module, tree: ModuleTree) -> str | None:
    """Return the path of the token embedding; None for a model without tokens.

    `get_input_embeddings` of the model or of a child names it. Two-tower models have no such method; their token
    embedding is the table whose number of rows is the text configuration's vocabulary size.
    """
    tables = {id(layer.module): layer for layer in tree.layers.values() if layer.kind == "embedding"}
    for module in (model, *model.children()):
        getter = getattr(module, "get_input_embeddings", None)
        try:
            named = getter() if callable(getter) else None
        except (AttributeError, NotImplementedError):  # raised by models without input embeddings (CLIP)
            continue
        input_layer = look_through(named) if isinstance(named, nn.Module) else nn.Identity()
        table = next((tables[id(part)] for part in input_layer.modules() if id(part) in tables), None)
        # the input layer of a vision tower may contain a table of positions
        if table is not None and (table.module is input_layer or "token" in table.path.rpartition(".")[2]):
            return table.path
    rows = getattr(text_config(model), "vocab_size", None)
    return next((s.path for s in tables.values() if s.in_features == rows and not tree.block_of(s.path)), None)


def vocab_size(model: nn.Module, tree: ModuleTree) -> int | None:
    """Return the number of rows of the token embedding, or of the largest table outside of the blocks."""
    named = token_embedding(model, tree)
    if named is not None or hasattr(model, "get_input_embeddings"):
        return tree.layers[named].in_features if named else None
    tables = [s.in_features for s in tree.layers.values() if s.kind == "embedding" and not tree.block_of(s.path)]
    return max(tables, default=None)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's text decoder, or of the model; None if the model has none."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text(decoder=True) if callable(text) else config


def _shared_parts(one: str, other: str) -> int:
    """Return the number of leading segments that two paths share."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def is_packable(model: nn.Module, tree: ModuleTree, roles: Roles, trunk: BlockList | None, family: str) -> bool:
    """Return True if attention with a pair mask is the only operation that mixes tokens."""
    config = getattr(model, "config", None)
    if trunk is None or token_embedding(model, tree) is None or getattr(config, "is_encoder_decoder", False):
        return False
    # transformers before 5.25 sets `_is_stateful`, and so does the code of models on the hub
    if getattr(model, "_is_stateful", False) or family in STATEFUL | SPARSE_OR_APPROXIMATE:
        return False
    if _names_recurrent_layers(text_config(model)):
        return False
    inside = [tree.modules[path] for path in tree.modules if any(is_below(path, root) for root in trunk.paths)]
    if any(isinstance(m, nn.RNNBase) or is_depthwise(m) or _keeps_state(m, model) for m in inside):
        return False
    mixes = any(mixer_layers(tree, root) for root in trunk.paths)
    attends = any(roles[path] in ATTENTION for path in roles if any(is_below(path, root) for root in trunk.paths))
    return attends and not mixes


def _keeps_state(module: nn.Module, model: nn.Module) -> bool:
    """Return True if the module's class name, without the model family's prefix, is that of a recurrent layer."""
    return STATE.search(type(module).__name__.removeprefix(family_prefix(text_config(model)))) is not None


def family_prefix(config: Any) -> str:
    """Return the prefix of a family's class names, which may contain a word such as "Mamba" for all its classes."""
    return type(config).__name__.removesuffix("Config").removesuffix("Text")


def _names_recurrent_layers(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None) or []
    return any(isinstance(each, str) and STATE.search(each) for each in layer_types)
