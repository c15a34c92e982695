"""Hosts that may compute for one another, because their layers read the same input."""

from torch import nn

from peftcore.detection.shared_input import shared_inputs
from peftcore.layers.host import AdaptedLayer


def link_sharing(parent: nn.Module) -> None:
    """Tell the hosts among a module's children which of those that come later read what they read."""
    for names in shared_inputs(parent):
        hosts = [child for name in names if isinstance(child := parent._modules[name], AdaptedLayer)]
        for position, host in enumerate(hosts, 1):
            host.sharing = hosts[position:]
