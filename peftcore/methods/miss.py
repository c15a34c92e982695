"""MiSS: y = Wx + b + Dᵀ Σ_k x_k, x cut into shards x_k of r features that share D. arXiv:2409.15371.

"bat" lets each shard differ: with W in blocks (r, r), W' = W + W D + D, where D is one (r, r) for each row of blocks.
"mini" repeats a D of mini_r columns over the outputs.
Shapes: i in_features, o out_features, r rows of D; D (r, o), "bat" (o/r, r, r), "mini" (r, mini_r).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.kernels.start_values import kaiming_uniform_
from peftcore.registry import register


@dataclass
class MissConfig(TunerConfig):
    """MiSS's options under PEFT's names."""

    starts: ClassVar[tuple[bool | str, ...]] = (True, False, "bat", "mini")

    r: int = 64
    """Features in a shard of the input (count); "bat" needs in_features and out_features to be multiples of it."""
    miss_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training; "bat" has no dropout."""
    mini_r: int = 1
    """Columns of D with "mini" (count); out_features must be a multiple of it."""
    init_weights: bool | str = True
    """True: D of all outputs; "bat" or "mini": these variants; False: like True but random, for tests."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "MiSS_only"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "mini_r")
        self.probability("miss_dropout")
        self.one_of("bias", self.bias, ("none", "all", "MiSS_only"))
        self.one_of("init_weights", self.init_weights, self.starts)

    def without_effect(self) -> dict[str, str]:
        return {"mini_r": "init_weights='mini'"} if self.mini_r != 1 and self.init_weights != "mini" else {}


@register("MISS", MissConfig)
class Miss(Adapter):
    """MiSS at one layer."""

    dropout_option = "miss_dropout"

    def __init__(self, config: MissConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        i, o, r = base.in_features, base.out_features, config.r
        self.variant = config.init_weights
        self.weight_space_forward = self.variant == "bat"
        self.add_dropout()
        self.r = r
        if r > i:
            raise ConfigError(f"MISS: r must be at most the {i} inputs of {path}, got {r}")
        if self.variant == "bat" and (i % r or o % r):
            raise ConfigError(
                f"MISS: 'bat' cuts W at {path} into (r, r) blocks, so r must divide {i} and {o}, got {r}; "
                f"try {math.gcd(i, o)}"
            )
        if self.variant == "mini" and o % config.mini_r:
            raise ConfigError(
                f"MISS: mini_r must divide the {o} outputs of {path}, got {config.mini_r}; try "
                f"{math.gcd(o, config.mini_r)}"
            )
        shape = {"bat": (o // r, r, r), "mini": (r, config.mini_r)}.get(str(self.variant), (r, o))
        self.miss_block = nn.Parameter(torch.empty(shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.variant is False:
            kaiming_uniform_(self.miss_block)
        else:
            nn.init.zeros_(self.miss_block)

    def _block(self) -> Tensor:
        """Return D (r, o)."""
        return self.miss_block.repeat(1, self.base.out_features // self.miss_block.shape[1])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropped(x)
        if short := -x.shape[-1] % self.r:
            x = F.pad(x, (0, short))
        shards = x.unflatten(-1, (-1, self.r))
        return self.base.add_pointwise(y, shards.sum(-2).to(y.dtype), self._block().T)

    def delta_weight(self) -> Tensor:
        columns = torch.arange(self.base.in_features, device=self.miss_block.device) % self.r
        return self._block().T[:, columns]

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.variant != "bat":
            return super().merged_weight(weight)
        d, r = self.miss_block.to(weight), self.r
        blocks = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (o/r, i/r, r, r)
        change = (blocks @ d[:, None] + d[:, None]).transpose(1, 2).reshape(weight.shape)
        return weight + change
