"""Hosts that may compute for one another, because their layers read the same input."""

from torch import nn

from peftcore.detection.layer_inputs import shared_input_groups
from peftcore.layers.adapter_layer import AdapterLayer


def link_shared_inputs(parent: nn.Module) -> None:
    """Tell the layers among a module's children which of those that come later read what they read."""
    for names in shared_input_groups(parent):
        layers = [child for name in names if isinstance(child := parent._modules[name], AdapterLayer)]
        for position, layer in enumerate(layers, 1):
            layer.sharing = layers[position:]
