"""PyTorch's transformer encoders fuse a whole layer when they evaluate, and read its weights past any adapter.

That is off while something inside is hosted, and on again once nothing is.
"""

from torch import nn

from peftcore.host import AdaptedLayer, AdaptedParameters, SavedModule

_SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_BEFORE = "_fused_before"
"""Attribute of an encoder whose switch is off: what it was."""


def switch_off(model: nn.Module, path: str) -> None:
    """Off in every encoder around `path`."""
    parts = path.split(".")
    for end in range(len(parts)):
        around = model.get_submodule(".".join(parts[:end]))
        for kind, (switch, off) in _SWITCHES.items():
            if isinstance(around, kind) and _BEFORE not in around.__dict__:
                around.__dict__[_BEFORE] = getattr(around, switch)
                setattr(around, switch, off)


def switch_on(model: nn.Module) -> None:
    """On again in encoders without a host inside."""
    for around in model.modules():
        if _BEFORE in around.__dict__ and not any(_is_host(module) for module in around.modules()):
            switch = next(switch for kind, (switch, _) in _SWITCHES.items() if isinstance(around, kind))
            setattr(around, switch, around.__dict__.pop(_BEFORE))


def _is_host(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer | AdaptedParameters | SavedModule)
