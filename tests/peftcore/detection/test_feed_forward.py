"""Roles of MLP layers follow from their shapes."""

import pytest
from torch import nn

from peftcore.detection.feed_forward import mlp_roles
from peftcore.detection.module_tree import AdaptableLayer


@pytest.mark.parametrize(
    ("sizes", "roles"),
    [
        ([(16, 64), (64, 16)], ["up", "down"]),
        ([(16, 48), (16, 48), (48, 16)], ["gate", "up", "down"]),
        ([(16, 96), (48, 16)], ["fused_gate_up", "down"]),
        ([(16, 4), (4, 16)], [None, None]),  # a bottleneck
        ([(16, 40), (32, 16)], [None, None]),
    ],
)
def test_roles_by_shape(sizes: list[tuple[int, int]], roles: list[str | None]) -> None:
    layers = [AdaptableLayer(f"block.{n}", nn.Linear(*size), "linear", *size) for n, size in enumerate(sizes)]
    found = mlp_roles(layers, block_width=16)
    assert [found.get(layer.path) for layer in layers] == roles
