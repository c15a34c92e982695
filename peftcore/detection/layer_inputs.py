"""The input of a layer: sibling layers that read the same tensor, and the position of the batch axis.

Both are guesses from the module tree. Siblings are found by names and shapes, so callers compare the input tensors.

A layer receives (B, T, features) or (T, B, features), and the shape does not tell which if B = T. PyTorch's attention
has the attribute `batch_first`. transformers puts the batch axis first, except in models that swap the first two axes
in a `forward`, such as XLNet and Longformer; their source code shows the swap.
"""

import inspect
import re
from collections.abc import Mapping
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from peftcore.bases import base_weight, is_adaptable
from peftcore.detection.feed_forward import mlp_roles
from peftcore.detection.module_tree import AdaptableLayer, look_through
from peftcore.detection.roles import Role, word_role

_SWAPS = ("transpose(0, 1)", "transpose(1, 0)", "permute(1, 0", "swapaxes(0, 1)")
_SHARED_INPUT_ROLES: tuple[tuple[Role, ...], ...] = (("query", "key", "value", "fused_kv"), ("gate", "up"))
_CROSS_ATTENTION = re.compile(r"cross|encoder_?attn|encdec|enc_dec|encoder_decoder", re.IGNORECASE)


def is_cross_attention(path: str) -> bool:
    """Return True if the path names a module of cross-attention, whose keys and values come from an encoder."""
    return _CROSS_ATTENTION.search(path) is not None


def shared_input_groups(parent: nn.Module, path: str = "") -> list[list[str]]:
    """Return groups of children that likely read the same input, such as query, key and value, or gate and up.

    In cross-attention, key and value read the encoder's output, and query does not.

    Args:
        parent: The module to examine; adapter layers among its children are ignored.
        path: Its path in the model, which tells cross-attention from self-attention.

    Returns:
        Lists of two or more child names, in order of declaration.
    """
    layers = _linear_children(parent)
    roles: Mapping[str, Role | None] = {layer.path: word_role(layer.path) for layer in layers}
    if not {"query", "key", "value"} & set(roles.values()):
        roles = mlp_roles(layers, layers[-1].out_features) if len(layers) > 2 else {}
    width = {layer.path: layer.in_features for layer in layers}
    groups: dict[tuple[tuple[Role, ...], int], list[str]] = {}
    reads_alone = "query" if is_cross_attention(path) else None
    for name, role in roles.items():
        for together in _SHARED_INPUT_ROLES:
            if role in together and role != reads_alone:
                groups.setdefault((together, width[name]), []).append(name)
    order = [layer.path for layer in layers]
    return [sorted(names, key=order.index) for names in groups.values() if len(names) > 1]


def _linear_children(parent: nn.Module) -> list[AdaptableLayer]:
    layers = []
    for name, child in parent.named_children():
        module = look_through(child)
        if is_adaptable(module) and (base := base_weight(module)).kind == "linear":
            layers.append(AdaptableLayer(name, module, base.kind, base.in_features, base.out_features))
    return layers


def rows_come_first(model: nn.Module, path: str) -> bool | None:
    """Return True if the batch axis is first in the layer's input, False if the token axis is.

    The nearest enclosing module with an attribute `batch_first` decides.

    Args:
        model: The model.
        path: Path of the layer.

    Returns:
        None if the position of the batch axis is unknown.
    """
    around = [model]
    for name in path.split(".")[:-1]:
        child = look_through(around[-1])._modules.get(name)
        if child is None:
            break
        around.append(look_through(child))
    for module in reversed(around):
        attention = (
            module.self_attn if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) else module
        )
        if (batch_first := vars(look_through(attention)).get("batch_first")) is not None:
            return bool(batch_first)
    is_transformers = any(isinstance(module, PreTrainedModel) for module in around)
    return True if is_transformers and not any(_swaps_axes(type(module)) for module in around) else None


@cache
def _swaps_axes(module_class: type[nn.Module]) -> bool:
    """Return True if the source of the class's `forward` swaps the first two axes of a tensor, or cannot be read."""
    for parent in module_class.__mro__:
        if parent is not nn.Module and "forward" in vars(parent):
            try:
                source = inspect.getsource(vars(parent)["forward"])
            except (OSError, TypeError):
                return True
            if any(swap in source for swap in _SWAPS):
                return True
    return False
