"""Layers of one module that read the same input: query, key and value; gate and up.

Told by words and shapes as everywhere in detection; it is a guess about a forward that nobody has run, so who uses it
compares the inputs. (In cross-attention key and value read the encoder, and query does not.)
"""

from collections.abc import Mapping

from torch import nn

from peftcore.bases import base_weight, is_adaptable
from peftcore.detection.feed_forward import mlp_roles
from peftcore.detection.module_tree import AdapterSlot, look_through
from peftcore.detection.roles import Role, word_role

_TOGETHER: tuple[tuple[Role, ...], ...] = (("query", "key", "value", "fused_kv"), ("gate", "up"))


def shared_inputs(parent: nn.Module) -> list[list[str]]:
    """Names of the children that read one input together, in order of declaration; two or more in each group."""
    sites = _linear_children(parent)
    roles: Mapping[str, Role | None] = {site.path: word_role(site.path) for site in sites}
    if not {"query", "key", "value"} & set(roles.values()):
        roles = mlp_roles(sites, sites[-1].out_features) if len(sites) > 2 else {}
    width = {site.path: site.in_features for site in sites}
    groups: dict[tuple[tuple[Role, ...], int], list[str]] = {}
    for name, role in roles.items():
        for together in _TOGETHER:
            if role in together:
                groups.setdefault((together, width[name]), []).append(name)
    order = [site.path for site in sites]
    return [sorted(names, key=order.index) for names in groups.values() if len(names) > 1]


def _linear_children(parent: nn.Module) -> list[AdapterSlot]:
    found = []
    for name, child in parent.named_children():
        layer = look_through(child)
        if is_adaptable(layer) and (base := base_weight(layer)).kind == "linear":
            found.append(AdapterSlot(name, layer, base.kind, base.in_features, base.out_features))
    return found
