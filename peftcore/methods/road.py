"""RoAd: y = R(Wx + b), R rotates and scales pairs of outputs: (αcosθ, −αsinθ; αsinθ, αcosθ). arXiv:2409.00119.

In each group of g outputs, element j of the first half is paired with element j of the second.
Shapes: o out_features; θ and α (o/2) for "road_1", one angle and scale a pair; (o) for "road_2", one an element;
(2o) for "road_4", two an element, g for the cosines and then g for the sines of each group.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.maths import scaled
from peftcore.kernels.start_values import normal_
from peftcore.registry import register

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""{variant: angles for each output}."""


@dataclass
class RoadConfig(TunerConfig):
    """RoAd's options under PEFT's names."""

    not_saved_if_none: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_pattern", "layers_to_transform")

    variant: str = "road_1"
    """Sharing of θ and α in the matrix of a pair: "road_1" by all entries, "road_2" by each row, "road_4" by none."""
    group_size: int = 64
    """Outputs in a group (count, even); out_features must be a multiple of it."""
    init_weights: bool = True
    """True: R starts as the identity; False: random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("variant", self.variant, SIZES)
        self.positive("group_size")
        if self.group_size % 2:
            raise ConfigError(f"RoadConfig: group_size must be even, got {self.group_size}; try {self.group_size + 1}")


@register("ROAD", RoadConfig)
class Road(Adapter):
    """RoAd at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: RoadConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        if base.out_features % config.group_size:
            raise ConfigError(
                f"ROAD: group_size must divide the {base.out_features} outputs of {path}, got {config.group_size}; "
                + (
                    f"try {fits}"
                    if (fits := math.gcd(base.out_features, config.group_size)) > 1
                    else "exclude the layer"
                )
            )
        self.group = config.group_size
        self.variant, self.init = config.variant, config.init_weights
        size = int(base.out_features * SIZES[config.variant])
        self.road_theta = nn.Parameter(torch.empty(size))
        self.road_alpha = nn.Parameter(torch.empty(size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init:
            nn.init.zeros_(self.road_theta)
            nn.init.ones_(self.road_alpha)
        else:
            normal_(self.road_theta, std=0.5)
            normal_(self.road_alpha, mean=1.0, std=0.5)

    def _turned(self, values: Tensor, axis: int) -> Tensor:
        """Return R times a tensor along `axis`, which has size o."""
        axis %= values.dim()
        theta, alpha = self.road_theta, self.road_alpha
        stay, cross = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_1":
            stay, cross = (v.view(-1, 1, self.group // 2).expand(-1, 2, -1) for v in (stay, cross))
        elif self.variant == "road_4":
            stay, cross = stay.view(-1, 2, self.group)[:, 0], cross.view(-1, 2, self.group)[:, 1]
        shape = (-1, *(1 for _ in range(values.dim() - 1 - axis)))
        stay, cross = stay.reshape(shape), cross.reshape(shape)
        first, second = values.unflatten(axis, (-1, 2, self.group // 2)).unbind(axis + 1)
        partner = torch.stack((-second, first), axis + 1).flatten(axis, axis + 2)
        return torch.addcmul(scaled(values, stay), partner, cross.to(values.dtype))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self._turned(y, -1 - len(self.base.kernel))

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight, 0)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._turned(bias, 0)
