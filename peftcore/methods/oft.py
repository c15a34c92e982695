"""OFT: y = W Rᵀx + b, R block-diagonal and orthogonal, each block the Cayley transform of a skew S. arXiv:2306.07280.

Shapes: i in_features, k kernel, b block size, n blocks: n·b = i·k (a convolution's unrolled patch; an embedding's
output); oft_R (n, b(b−1)/2) is S above its diagonal, (1, b(b−1)/2) with `block_share`. `use_cayley_neumann` replaces
the inverse by its first powers (OFTv2, arXiv:2506.19847). Unlike PEFT, `module_dropout` acts, and a convolution
rotates its patches (PEFT adds up overlapping ones); `coft` projects after each step, not in the forward pass.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcore.adapter import Adapter
from peftcore.bases import BaseWeight
from peftcore.config import TunerConfig
from peftcore.errors import ConfigError
from peftcore.files import CONFIG_NAME
from peftcore.kernels.maths import cayley, drop_blocks, neumann, rotate_blocks, weight_shape, widened
from peftcore.kernels.start_values import normal_
from peftcore.registry import register

_FORMER = (
    "HF PEFT before 0.16 computed OFT in another way, and its adapters (tensors oft_r) can be read neither here nor by "
    "newer versions of HF PEFT; train it again, or merge it with the version that made it, such as peft==0.15.2"
)


def _since_018(version: Any) -> bool:
    """Return True for a version of HF PEFT from 0.18 on, such as "0.18.1" or "0.19.0.dev0@UNKNOWN"."""
    parts = re.match(r"(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return parts is not None and (int(parts[1]), int(parts[2] or 0)) >= (0, 18)


@dataclass
class OFTConfig(TunerConfig):
    """OFT's options under PEFT's names."""

    r: int = 0
    """Blocks in a layer (count); give this or oft_block_size, and 0 for the other."""
    oft_block_size: int = 32
    """Features that one block rotates (count); the nearest divisor of the layer's features is used."""
    module_dropout: float = 0.0
    """Share of the blocks that are the identity in one forward pass in training."""
    coft: bool = False
    """Keep ‖S‖ of each block within eps/√n (constrained OFT)."""
    eps: float = 6e-5
    """Largest ‖S‖·√n of a block with coft."""
    block_share: bool = False
    """Share one block among all features."""
    use_cayley_neumann: bool = True
    """Use a power series for the inverse: cheaper, and orthogonal only while S is small."""
    num_cayley_neumann_terms: int = 5
    """Powers of S in the series, the identity included (count)."""
    bias: str = "none"
    """Biases of the model that train too: "none", "all" or "oft_only"."""
    init_weights: bool = True
    """True: R starts at the identity; False: random, for tests."""
    fan_in_fan_out: bool = False
    """Read and saved for PEFT; without effect, because the orientation is found per layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            raise ConfigError(
                "OFTConfig: give either r (blocks) or oft_block_size and set the other to 0, since r x oft_block_size "
                f"is the layer's size; got r={self.r}, oft_block_size={self.oft_block_size}"
            )
        self.positive("r" if self.r else "oft_block_size")
        self.probability("module_dropout")
        self.one_of("bias", self.bias, ("none", "all", "oft_only"))
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise ConfigError(
                "OFTConfig: num_cayley_neumann_terms must be at least 2, since with fewer nothing turns; "
                f"got {self.num_cayley_neumann_terms}; try 5"
            )
        if self.coft and not self.eps > 0:
            raise ConfigError(f"OFTConfig: eps must be positive; got {self.eps}; try 6e-5")

    @classmethod
    def check_saved(cls, values: Mapping[str, Any]) -> None:
        if "oft_block_size" not in values and values.get("r"):
            raise ConfigError(f"OFT: {CONFIG_NAME} has no oft_block_size: {_FORMER}")
        former = not _since_018(values.get("peft_version"))
        if former and values.get("use_cayley_neumann") and values.get("num_cayley_neumann_terms", 5) > 2:
            warnings.warn(
                f"OFT: {CONFIG_NAME} names no peft_version from 0.18 on. Before, HF PEFT counted the last power of the "
                "Cayley-Neumann series twice, so that adapter's outputs differ a little here and in newer versions of "
                "HF PEFT; train it again, or merge it with the version that made it",
                stacklevel=5,
            )

    def block_size(self, features: int, path: str) -> int:
        """Return the block size b for a layer with this many features to rotate."""
        asked = self.oft_block_size or self.r
        divisors = (d for d in range(1, features + 1) if features % d == 0)
        nearest = min(divisors, key=lambda divisor: (abs(divisor - asked), divisor))
        size = nearest if self.oft_block_size else features // nearest
        if size == 1:
            raise ConfigError(
                f"OFT: blocks of size 1 rotate nothing at {path}, which has {features} features; take a larger size"
            )
        if nearest != asked:
            option = "oft_block_size" if self.oft_block_size else "r"
            warnings.warn(f"OFT: {option}={asked} does not divide {features}; {nearest} is used", stacklevel=2)
        return size


@register("OFT", OFTConfig)
class OFT(Adapter):
    """OFT at one layer."""

    layer_kinds = frozenset({"linear", "conv", "embedding"})
    former_tensors: ClassVar = {"oft_r": _FORMER}

    def __init__(self, config: OFTConfig, base: BaseWeight, path: str):
        super().__init__(config, base, path)
        self.config = config
        self.weight_space_forward = base.kind == "conv"
        features = base.out_features if base.kind == "embedding" else math.prod(weight_shape(base)[1:])
        size = config.block_size(features, path)
        blocks = 1 if config.block_share else features // size
        self.oft_R = nn.Parameter(torch.empty(blocks, size * (size - 1) // 2))
        self.r, self.size = features // size, size
        self.make_constants()

    @property
    def oft_block_size(self) -> int:
        """b, HF PEFT's attribute of the layer."""
        return self.size

    def make_constants(self) -> None:
        upper = torch.triu_indices(self.size, self.size, 1, device=self.oft_R.device)
        self.register_buffer("upper", upper, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.oft_R) if self.config.init_weights else normal_(self.oft_R, std=0.1)

    def projected(self) -> Tensor:
        """Return oft_R with each block's ‖S‖ = √2‖row‖ limited to eps/√n; oft_R itself without `coft`."""
        rows = self.oft_R.detach()
        radius = self.config.eps / math.sqrt(2 * len(rows))
        return rows * (radius / rows.norm(dim=1, keepdim=True)).clamp(max=1) if self.config.coft else rows

    def blocks(self) -> Tensor:
        """Return the blocks of R (n or 1, b, b), in float32 or float64 even under autocast."""
        rows = widened(self.oft_R)
        if self.config.coft:
            rows = self.projected() + (rows - rows.detach())  # the gradient ignores the projection
        with torch.autocast(rows.device.type, enabled=False):
            skew = rows.new_zeros(len(rows), self.size, self.size)
            skew[:, self.upper[0], self.upper[1]] = rows  # type: ignore[index]
            skew = skew - skew.mT
            if self.config.use_cayley_neumann:
                return neumann(skew, self.config.num_cayley_neumann_terms)
            return cayley(skew)

    def _acting_blocks(self) -> Tensor:
        drops = self.training and self.config.module_dropout
        return drop_blocks(self.blocks(), self.config.module_dropout) if drops else self.blocks()

    def before(self, x: Tensor) -> Tensor:
        return x if self.base.kind == "embedding" else rotate_blocks(x, self._acting_blocks())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return rotate_blocks(y, self._acting_blocks()) if self.base.kind == "embedding" else y

    def forward_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self._acting_blocks())

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.blocks())

    def _turned(self, weight: Tensor, blocks: Tensor) -> Tensor:
        if self.base.kind == "embedding":
            return rotate_blocks(weight.T, blocks).T
        return rotate_blocks(weight.flatten(1), blocks.mT).view(weight.shape)

    def checkpoint_keys(self) -> dict[str, str]:
        return {"oft_R": "oft_embedding_R.weight" if self.base.kind == "embedding" else "oft_R.weight"}

    @classmethod
    @torch.no_grad()
    def on_step(cls, config: OFTConfig, adapters: Mapping[str, Any], step: int, optimizer: Any) -> None:
        """Project oft_R onto the ball of constrained OFT."""
        for adapter in adapters.values() if config.coft else ():
            adapter.oft_R.copy_(adapter.projected())
