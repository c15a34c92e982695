"""PyTorch's transformer encoders fuse a whole layer when they evaluate, and read its weights past any adapter.

That is off while something inside is wrapped, and on again once nothing is.
"""

from torch import nn

from peftcore.injection.module_index import ModuleIndex
from peftcore.layers.wrapper import unwrapped

_SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_BEFORE = "_fused_before"
"""Attribute of an encoder whose switch is off: what it was."""


def switch(module_index: ModuleIndex) -> None:
    """Off in every encoder with a wrapper inside, on in every other."""
    modules = {"": module_index.model, **module_index.modules}
    found = {path: module for path, module in modules.items() if isinstance(module, tuple(_SWITCHES))}
    if not found:
        return
    wrappers = [path for path, module in module_index.modules.items() if unwrapped(module) is not module]
    for path, encoder in found.items():
        prefix = f"{path}." if path else ""
        _set(encoder, off=any(wrapper.startswith(prefix) for wrapper in wrappers))


def _set(encoder: nn.Module, off: bool) -> None:
    name, off_value = next(value for kind, value in _SWITCHES.items() if isinstance(encoder, kind))
    if off and _BEFORE not in encoder.__dict__:
        encoder.__dict__[_BEFORE] = getattr(encoder, name)
        setattr(encoder, name, off_value)
    elif not off and _BEFORE in encoder.__dict__:
        setattr(encoder, name, encoder.__dict__.pop(_BEFORE))
