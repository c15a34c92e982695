"""The fused inference path of PyTorch's transformer encoders, which bypasses adapters.

In evaluation mode these encoders run a whole layer as one kernel, which reads the weights directly. The fused path is
disabled while a module inside of the encoder is wrapped, and enabled again afterwards.
"""

from torch import nn

from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped

_FUSION_SETTINGS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""{class: (attribute that controls the fused path, value that disables it)}"""
_BEFORE = "_fused_before"
"""Attribute of an encoder that stores the original value."""


def update_fused_paths(module_index: ModuleIndex) -> None:
    """Disable the fused path of every encoder with a wrapper inside, and enable it in every other encoder."""
    modules = {"": module_index.model, **module_index.modules}
    encoders = {path: module for path, module in modules.items() if isinstance(module, tuple(_FUSION_SETTINGS))}
    if not encoders:
        return
    wrappers = [path for path, module in module_index.modules.items() if unwrapped(module) is not module]
    for path, encoder in encoders.items():
        prefix = f"{path}." if path else ""
        _set(encoder, off=any(wrapper.startswith(prefix) for wrapper in wrappers))


def _set(encoder: nn.Module, off: bool) -> None:
    name, off_value = next(value for kind, value in _FUSION_SETTINGS.items() if isinstance(encoder, kind))
    if off and _BEFORE not in encoder.__dict__:
        encoder.__dict__[_BEFORE] = getattr(encoder, name)
        setattr(encoder, name, off_value)
    elif not off and _BEFORE in encoder.__dict__:
        setattr(encoder, name, encoder.__dict__.pop(_BEFORE))
